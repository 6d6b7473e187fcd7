"""llama.cpp's server on GGUF files: python client_llama.py REQUEST.json -> what it answers, as JSON.

REQUEST: {"text": file, "projector": file, "image": file, "question": text, "new": tokens to come}; where there is no
projector, {"text": file, "ids": prompt, "new": ...}. The answer: the question as tokens, how many tokens the prompt
had, the new `tokens`, and for each of them the log-probabilities of all tokens.
"""

import base64
import json
import sys
import urllib.request
from pathlib import Path

import xllamacpp

request = json.loads(Path(sys.argv[1]).read_text())
options = xllamacpp.CommonParams()
options.model.path, options.n_ctx, options.n_parallel = request["text"], 256, 1
options.cpuparams.n_threads, options.warmup, options.verbosity, options.fit_params = 1, False, 0, False
options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
if "projector" in request:
    options.mmproj.path, options.mmproj_use_gpu = request["projector"], False
server = xllamacpp.Server(options)


def ask(path, body=None):
    """What the server says."""
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(server.listening_address + path, data, {"Content-Type": "application/json"})
    return json.loads(urllib.request.urlopen(asked).read())


result, prompt = {}, request.get("ids")
if "projector" in request:
    image = base64.b64encode(Path(request["image"]).read_bytes()).decode()
    marked = ask("/props")["media_marker"] + request["question"]
    prompt = {"prompt_string": marked, "multimodal_data": [image]}
    result = {"question": ask("/tokenize", {"content": request["question"], "add_special": False})["tokens"]}
how = {"temperature": 0, "n_probs": request["vocabulary"], "return_tokens": True, "cache_prompt": False}
found = ask("/completion", {"prompt": prompt, "n_predict": request["new"], "ignore_eos": True, **how})
rows = []
for step in found["completion_probabilities"]:
    by_token = {one["id"]: one["logprob"] for one in step["top_logprobs"]}
    rows.append([by_token[token] for token in range(request["vocabulary"])])
print(json.dumps({**result, "asked": found["tokens_evaluated"], "tokens": found["tokens"], "logprobs": rows}))
