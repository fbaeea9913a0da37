"""A merged model as transformers' own directory, which other tools convert, quantise and serve."""
