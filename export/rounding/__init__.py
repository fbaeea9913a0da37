"""Round weights so that the outputs change least, as measured: by GPTQ on a text, or by a bit width for each role."""
