"""The metadata keys of peftfx on weights, nodes, models and directories."""

from __future__ import annotations

SOURCE = "peftfx.source"  #: key in an initializer's `meta`: where its contents come from; equal for equal contents
PERM = "peftfx.perm"  #: metadata key of a weight whose axes are stored permuted: their order, such as `1 0`
SCOPE = "peftfx.scope"  #: metadata key of a node: the path of the module whose code made the node
ADAPTERS_KEY = "peftfx.adapters"  #: metadata key: the adapters in a model, `name: methods`, and where they went
BASE_MODEL = "peftfx.base"  #: metadata key: the class of the base
FINGERPRINT = "peftfx.base_fingerprint"  #: metadata key: a hash of some values of each weight of the base
ENGINE = "peftfx.engine"  #: metadata key: the engine that translated the model, and why not the fast one
PERMUTED = "peftfx.permuted"  #: key on a lazy tensor: a function that reads it with its axes in another order
PIECES = "peftfx.pieces"  #: key on a lazy tensor: a function that reads it in pieces of rows
