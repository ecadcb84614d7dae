"use strict";
(() => {
  const root = document.documentElement;
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const probe = document.getElementById("probe");
  const status = document.getElementById("status");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const colour = (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  const fade = (rgb, alpha) => rgb.replace("rgb(", "rgba(").replace(")", `, ${alpha})`);
  const BANDS = 8; // more arms than these at once, and bands would hide one another

  function paint(trace, hidden, bands, theme) {
    const { arm, colour: index, kind } = trace.meta;
    const own = theme.arms[index];
    const out = { ...trace, showlegend: kind === "line", visible: !hidden.has(arm) && (kind !== "band" || bands) };
    if (trace.marker) {
      const line = { width: kind === "open" ? 2 : 0, color: own };
      out.marker = { ...trace.marker, color: fade(own, kind === "dots" ? 0.5 : 1), line };
    }
    if (trace.line) out.line = { ...trace.line, color: own };
    for (const bars of ["error_x", "error_y"]) if (trace[bars]) out[bars] = { ...trace[bars], color: own };
    if (kind === "band") out.fillcolor = fade(own, 0.14);
    return out;
  }

  function dress(layout, narrow, theme) {
    const axis = (given) => ({
      exponentformat: "power", gridcolor: theme.line, linecolor: theme.line, zeroline: false, zerolinecolor: theme.quiet, zerolinewidth: 1.5,
      ...given, fixedrange: narrow, title: { ...given.title, font: { size: narrow ? 12 : 13 } },
    });
    return {
      ...layout,
      xaxis: axis(layout.xaxis),
      yaxis: axis(narrow && layout.meta.narrow.length ? { ...layout.yaxis, ticktext: layout.meta.narrow } : layout.yaxis),
      height: narrow && !layout.meta.narrow.length ? 320 : layout.height,
      annotations: (layout.annotations || []).map((note) => ({ ...note, bgcolor: theme.page, font: { color: theme.quiet, size: 12 } })),
      font: { family: theme.font, size: narrow ? 12 : 13, color: theme.quiet },
      hoverlabel: { bgcolor: theme.page, bordercolor: theme.line, font: { family: theme.font, size: 13, color: theme.ink }, align: "left" },
      hovermode: "closest", dragmode: narrow ? false : "zoom", paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    };
  }

  function wire(section) {
    const drawn = figures[section.dataset.study];
    const state = { metric: 0, setting: 0, variant: 0, cost: 0, curve: 0 };
    const hidden = new Set();
    const plots = [...section.querySelectorAll(".plot")];
    const legend = [...section.querySelectorAll(".legend button")];
    const arms = legend.length || 1;

    function draw(plot, theme) {
      const figure = drawn[plot.dataset.plot][plot.dataset.by.split(" ").map((dim) => state[dim]).join(",")];
      plot.hidden = !figure;
      plot.nextElementSibling.hidden = Boolean(figure);
      plot.parentElement.querySelector(".save").hidden = !figure;
      if (!figure) return;
      const narrow = plot.clientWidth < 480;
      plot.setAttribute("aria-label", figure.layout.meta.alt);
      const traces = figure.data.map((trace) => paint(trace, hidden, arms - hidden.size <= BANDS, theme));
      Plotly.react(plot, traces, dress(figure.layout, narrow, theme), { responsive: true, displayModeBar: false });
    }

    function show() {
      const theme = {
        arms: [0, 1, 2, 3, 4, 5, 6].map((i) => colour(`arm-${i}`)), ink: colour("ink"), quiet: colour("quiet"), line: colour("line"),
        page: colour("page"), font: getComputedStyle(document.body).fontFamily,
      };
      for (const plot of plots) draw(plot, theme);
      document.getElementById("js-plotly-tester")?.setAttribute("aria-hidden", "true");
      for (const table of section.querySelectorAll("[data-when]"))
        table.hidden = table.dataset.when.split(" ").some((pair) => state[pair.split("=")[0]] !== Number(pair.split("=")[1]));
    }

    for (const select of section.querySelectorAll("select"))
      select.addEventListener("change", () => {
        state[select.dataset.dim] = Number(select.value);
        show();
      });
    for (const button of legend)
      button.addEventListener("click", () => {
        const arm = Number(button.dataset.arm);
        if (!hidden.delete(arm)) hidden.add(arm);
        button.setAttribute("aria-pressed", String(!hidden.has(arm)));
        show();
      });
    return show;
  }

  const shows = [...document.querySelectorAll(".study")].map(wire);
  const redraw = () => shows.forEach((show) => setTimeout(show)); // one study at a time, so that the page stays alive

  const button = document.getElementById("theme");
  const stored = (() => {
    try {
      return localStorage.getItem("weightroom-theme");
    } catch {
      return null;
    }
  })();
  if (stored) root.style.colorScheme = stored;
  const isDark = () => (root.style.colorScheme ? root.style.colorScheme === "dark" : dark.matches);
  const themed = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    redraw();
  };
  button.addEventListener("click", () => {
    root.style.colorScheme = isDark() ? "light" : "dark";
    try {
      localStorage.setItem("weightroom-theme", root.style.colorScheme);
    } catch {
      // a page without storage forgets
    }
    themed();
  });
  dark.addEventListener("change", themed);
  themed();

  let width = innerWidth;
  let timer;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    clearTimeout(timer);
    timer = setTimeout(redraw, 150);
  });

  for (const save of document.querySelectorAll(".save"))
    save.addEventListener("click", () => {
      const plot = save.closest("figure").querySelector(".plot");
      const { width, height } = plot._fullLayout;
      const legend = { orientation: "h", y: 1.02, yanchor: "bottom" }; // the page has its own; a picture needs one
      const layout = { ...plot.layout, paper_bgcolor: colour("page"), showlegend: plot.data.some((trace) => trace.showlegend), legend };
      Plotly.downloadImage({ data: plot.data, layout }, { format: "png", scale: 3, width, height, filename: plot.dataset.plot });
    });

  for (const copy of document.querySelectorAll(".copy"))
    copy.addEventListener("click", async () => {
      const text = document.getElementById(copy.dataset.copy);
      try {
        await navigator.clipboard.writeText(text.textContent);
      } catch {
        getSelection().selectAllChildren(text);
        document.execCommand("copy");
      }
      status.textContent = "Copied";
      copy.firstChild.textContent = "Copied";
      setTimeout(() => (copy.firstChild.textContent = "Copy"), 1500);
    });
})();
