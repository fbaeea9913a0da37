"""Sounds: the two views of a model of text and sounds that generates, each run with its own graph.

    audio:   input_features, masks, ... -> audio_features
    decode:  the inputs for a text, and audio_features -> logits, present.N.key/value

A call of the first view encodes any number of sounds. In the prefill, the features replace the text's tokens of sounds,
in order. A step without such tokens gets `audio_features` of length 0.
"""
