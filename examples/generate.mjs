// Generate text with an export of peftfx in Node.js: the most likely token, again and again.
//
//     npm install onnxruntime-node
//     node generate.mjs DIR COUNT TOKEN...    # such as: node generate.mjs onnx 8 3 5 8
//
// DIR is an export in its decode view. Tokens are numbers: a tokenizer of your choice makes them, and reads the result.

import ort from "onnxruntime-node";

const [directory, count, ...prompt] = process.argv.slice(2);
const session = await ort.InferenceSession.create(`${directory}/model.onnx`);
const row = (numbers) => new ort.Tensor("int64", BigInt64Array.from(numbers, BigInt), [1, numbers.length]);

// Nothing is in the cache yet: [batch, heads, 0, width].
let cache = {};
for (const { name, shape } of session.inputMetadata)
  if (name.startsWith("past_key_values."))
    cache[name] = new ort.Tensor("float32", new Float32Array(0), [1, shape[1], 0, shape[3]]);

const tokens = prompt.map(Number);
let fresh = tokens.slice(); // what the cache does not have
while (tokens.length < prompt.length + Number(count)) {
  const before = tokens.length - fresh.length;
  const output = await session.run({
    input_ids: row(fresh),
    attention_mask: row(tokens.map(() => 1)),
    position_ids: row(fresh.map((_, i) => before + i)),
    ...cache,
  });
  const last = output.logits.data.slice(-output.logits.dims[2]);
  fresh = [last.indexOf(Math.max(...last))];
  tokens.push(...fresh);
  cache = Object.fromEntries(Object.keys(cache).map((n) => [n, output[n.replace("past_key_values", "present")]]));
}
console.log(tokens.join(" "));
