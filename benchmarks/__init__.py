"""The benchmarks, one a file: each turns its official files into tasks (see `data.load`)."""
