"""What passes share: patterns, a site's own operation, and pieces that are put into a graph."""
