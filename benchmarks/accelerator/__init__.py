"""One command that checks, times and explains this package on an accelerator."""
