// transformers.js on an exported folder: node client.mjs ROOT NAME REQUEST.json -> new tokens, as JSON.
// REQUEST: {"max_new_tokens": n, "tensors": [{name, type, dims, data}]} or {..., "image": file, "text": prompt}.
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';

const require = createRequire(process.env.SLIMVLM_CLIENTS + '/package.json');
const { AutoModelForImageTextToText, AutoProcessor, RawImage, Tensor, env } = await import(
    pathToFileURL(require.resolve('@huggingface/transformers')).href
);
const [root, name, file] = process.argv.slice(2);
const request = JSON.parse(readFileSync(file, 'utf8'));
env.allowRemoteModels = false;
env.localModelPath = root;

const arrays = {
    int64: (data) => BigInt64Array.from(data.map(BigInt)),
    float32: (data) => Float32Array.from(data),
    bool: (data) => Uint8Array.from(data),
};

let inputs = {};
if (request.image) {
    const processor = await AutoProcessor.from_pretrained(name);
    inputs = await processor(await RawImage.read(request.image), request.text);
} else {
    for (const { name, type, dims, data } of request.tensors) inputs[name] = new Tensor(type, arrays[type](data), dims);
}
const model = await AutoModelForImageTextToText.from_pretrained(name, { dtype: request.dtype ?? 'fp32', device: 'cpu' });
const output = await model.generate({ ...inputs, max_new_tokens: request.max_new_tokens, do_sample: false });
const asked = inputs.input_ids.dims[1];
console.log(JSON.stringify(output.tolist().map((row) => row.slice(asked).map(Number))));
