"""Self-contained HTML pages made from plain data, without a framework. The callers decide what the pages show."""
