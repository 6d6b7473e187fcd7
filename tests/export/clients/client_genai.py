"""onnxruntime-genai on an exported folder: python client_genai.py FOLDER REQUEST.json -> new tokens, as JSON."""

import json
import sys
from pathlib import Path

import numpy
import onnxruntime_genai

folder, file = sys.argv[1:]
request = json.loads(Path(file).read_text())
model = onnxruntime_genai.Model(folder)
inputs = onnxruntime_genai.NamedTensors()
for tensor in request["tensors"]:
    array = numpy.array(tensor["data"]).reshape(tensor["dims"])
    inputs[tensor["name"]] = array.astype("int32" if tensor["name"] == "input_ids" else tensor["type"])
parameters = onnxruntime_genai.GeneratorParams(model)
parameters.set_search_options(max_length=request["max_length"], do_sample=False)
generator = onnxruntime_genai.Generator(model, parameters)
generator.set_inputs(inputs)
tokens = []
while not generator.is_done() and len(tokens) < request["max_new_tokens"]:
    generator.generate_next_token()
    tokens.append(int(generator.get_next_tokens()[0]))
print(json.dumps([tokens]))
