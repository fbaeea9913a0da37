"""Pages: self-contained HTML made of plain data, without a framework; what is shown on them is the callers'."""
