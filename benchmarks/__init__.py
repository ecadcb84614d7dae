"""Speed beside the peer, in the same run: ``python -m benchmarks [NAME ...]`` (``make bench``)."""
