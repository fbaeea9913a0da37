"""What passes share: matching of patterns, a site's own operation, and splicing of new nodes into a graph."""
