"""The contract: what a method must say, for each kind of site; `peftfx.method` hands on what authors import."""
