"""Reports, plots and merged studies."""
