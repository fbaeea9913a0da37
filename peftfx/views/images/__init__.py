"""Images: the two views of a model of text and images that generates, each run with its own graph.

    vision:  pixel_values, ... -> image_features
    decode:  the inputs for a text, and image_features -> logits, present.N.key/value

A call of the first view encodes one image. In the prefill, the features replace the text's image tokens, in order. A
step without image tokens gets `image_features` of length 0.
"""
