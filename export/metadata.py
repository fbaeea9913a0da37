"""What a weight, a model or a directory carries under names of peftfx's own."""

from __future__ import annotations

SOURCE = "peftfx.source"  #: in the `meta` of an initializer: what it is read from, equal for equal contents
PERM = "peftfx.perm"  #: metadata key of a weight that is stored permuted: how, as `1 0`
SCOPE = "peftfx.scope"  #: metadata key of a node: the path of the module whose code it is
ADAPTERS_KEY = "peftfx.adapters"  #: metadata key: the adapters in a model, `name: methods`, and where they went
BASE_MODEL = "peftfx.base"  #: metadata key: the class of the base
FINGERPRINT = "peftfx.base_fingerprint"  #: metadata key: a hash of some values of each of its weights
ENGINE = "peftfx.engine"  #: metadata key: the road a model came by, and why not the fast one
SIZES_KEY = "peftfx.sizes"  #: metadata key: conditions on the sizes of a call under which the model is right
PERMUTED = "peftfx.permuted"  #: of a lazy tensor: reads it with its axes in another order
PIECES = "peftfx.pieces"  #: of a lazy tensor: reads it, some rows after others
