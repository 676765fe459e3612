// Answers texts with a student that `hf-encdec-distill export MODEL --target onnx OUT` has written, on ONNX Runtime.
//
//     npm install --ignore-scripts        (the scripts would fetch what only a GPU needs)
//     node generate.mjs OUT "def area(radius): return 3.14159 * radius ** 2"
//
// The encoder reads the prompt once. What the decoder needs of it, keys and values for each layer, goes from the
// outputs of one graph to the inputs of the other as it is; then each token costs one call of the decoder.
import fs from "node:fs";
import path from "node:path";
import { Tokenizer } from "@huggingface/tokenizers";
import * as ort from "onnxruntime-node";

const [folder, ...texts] = process.argv.slice(2);
const read = (name) => JSON.parse(fs.readFileSync(path.join(folder, name), "utf8"));
const config = read("config.json");
const generation = read("generation_config.json");
const exported = read("exported.json");
if (exported.target !== "onnx" || exported.shapes !== "dynamic") {
  throw new Error(`${folder} holds ${exported.target} of shapes ${exported.shapes}: export with --target onnx`);
}
const maxNewTokens = Number(process.env.MAX_NEW_TOKENS ?? 32);
const ends = [generation.eos_token_id ?? config.eos_token_id].flat();

const tokenizer = new Tokenizer(read("tokenizer.json"), read("tokenizer_config.json"));
const encoder = await ort.InferenceSession.create(path.join(folder, "encoder_model.onnx"));
const decoder = await ort.InferenceSession.create(path.join(folder, "decoder_model.onnx"));

const int64 = (numbers) => new ort.Tensor("int64", BigInt64Array.from(numbers, BigInt), [1, numbers.length]);
const type = exported.cache_dtype; // float32 or float16
const emptyCache = () =>
  Object.fromEntries(
    decoder.inputNames
      .filter((name) => name.includes(".decoder."))
      .map((name) => [name, new ort.Tensor(type, type === "float16" ? new Uint16Array(0) : new Float32Array(0),
        [1, config.num_key_value_heads, 0, config.head_dim])])
  );

// The bits of a half as a number that is in the order of the halves: sign and magnitude.
const inOrder = (bits) => (bits & 0x8000 ? -(bits & 0x7fff) : bits);

async function generate(ids) {
  const attentionMask = int64(ids.map(() => 1));
  const ofPrompt = await encoder.run({ input_ids: int64(ids), attention_mask: attentionMask });
  const feeds = { encoder_attention_mask: attentionMask, ...emptyCache() };
  for (const [name, tensor] of Object.entries(ofPrompt)) feeds[name.replace("present", "past_key_values")] = tensor;

  const answer = [];
  let token = config.decoder_start_token_id;
  while (answer.length < maxNewTokens) {
    const { logits, ...present } = await decoder.run({ ...feeds, input_ids: int64([token]) });
    for (const [name, tensor] of Object.entries(present)) feeds[name.replace("present", "past_key_values")] = tensor;
    // Batch 1, one token: [vocabulary]. Where there is no Float16Array, halves come as their bits.
    const scores = logits.data instanceof Uint16Array ? Array.from(logits.data, inOrder) : logits.data;
    token = scores.reduce((best, score, id) => (Number(score) > Number(scores[best]) ? id : best), 0);
    if (ends.includes(token)) break;
    answer.push(token);
  }
  return answer;
}

for (const text of texts) {
  const answer = await generate(tokenizer.encode(text).ids);
  console.log(tokenizer.decode(answer, { skip_special_tokens: true }).trim());
}
