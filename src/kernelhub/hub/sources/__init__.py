"""Where kernels come from, behind one small protocol (`base.Source`)."""
