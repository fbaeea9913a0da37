"""A merged model as a directory of transformers' own: what others convert, quantise and serve."""
