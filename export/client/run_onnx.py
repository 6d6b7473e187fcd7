"""Ask the model in this folder about an image: run_onnx.py IMAGE QUESTION [--variant q4] [--runtime openvino]."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tokenizers import Tokenizer


def tiled(image, spec):
    """Views of the tiles of the grid that is most like the image in shape, then of the whole image (InternVL)."""
    (h, w), shape = spec["tile"], image.width / image.height
    room = 2 * image.width * image.height / (h * w)  # among grids alike, the largest that is half filled
    misfit = {(r, c): (abs(shape - c / r), -r * c if r * c < room else r * c) for r, c in spec["grids"]}
    rows, columns = min(misfit, key=misfit.get)
    views = [{"size": [rows * h, columns * w], "box": [r * h, c * w, h, w]} for r, c in np.ndindex(rows, columns)]
    return views + [{"size": [h, w]}] * (len(views) > 1)


def pixels(image, spec):
    """The image as the vision graph takes it; `spec` is manifest.json's run.image."""
    deep = {"F": 255, "I": 1 / 257}.get(image.mode[0])  # grey in floats up to 1, or in 16 bits
    image = Image.fromarray((np.asarray(image) * deep).round().astype(np.uint8)) if deep else image
    image, arrays = ImageOps.exif_transpose(image).convert("RGB"), []
    if spec["resize_first"]:
        image = image.resize(spec["resize_first"][::-1], Image.Resampling.BICUBIC)
    if longest := spec.get("longest_edge"):  # the other side is made even
        sides = [int(side * longest / max(image.size)) for side in image.size]
        image = image.resize([side if side == longest else max(1, side + side % 2) for side in sides], spec["resample"])
    for view in spec["views"] if "views" in spec else tiled(image, spec):
        size = view.get("size") or [int(side * view["shortest_edge"] / min(image.size)) for side in image.size[::-1]]
        part = image.resize(size[::-1], spec["resample"])
        if "box" in view:  # of two sizes only: in the middle
            height, width = view["box"][-2:]
            top, left = view["box"][:-2] or ((part.height - height) // 2, (part.width - width) // 2)
            part = part.crop((left, top, left + width, top + height))
        array = np.asarray(part, np.float32) * spec["scale"]
        arrays.append(((array - spec["mean"]) / spec["std"]).transpose(2, 0, 1))
    array = np.stack(arrays * spec["repeat"]).reshape(spec["split"])  # into patches, where there are any
    return array.transpose(spec["order"]).reshape(spec["shape"])


def prompt_ids(tokenizer, question, spec, tiles=1):
    """Token ids [1, S] of the prompt, with the image's tokens in it; `spec` is manifest.json's run.prompt."""
    ids = tokenizer.encode(spec["text"].replace("{question}", question), add_special_tokens=spec["special"]).ids
    at = 0 if spec["image_first"] else ids.index(spec["placeholder"])
    inside = [token for token in spec["image_ids"] for _ in range(tiles if token == spec["image_token"] else 1)]
    return np.array([ids[:at] + inside + ids[at + (not spec["image_first"]) :]])


def positions(ids, generation, grid):
    """[1, S], or [3, 1, S] for M-RoPE: an image counts its rows and columns apart."""
    if generation["positions"] == "count":
        return np.arange(ids.shape[1])[None] + generation["first_position"]
    at = int((ids[0] == generation["image_token"]).argmax())
    before = np.broadcast_to(np.arange(at), (3, at))
    inside = np.indices(grid // np.array([1, generation["merge"], generation["merge"]])).reshape(3, -1) + at
    after = np.arange(ids.shape[1] - at - inside.shape[1]) + inside.max() + 1
    return np.concatenate([before, inside, np.broadcast_to(after, (3, len(after)))], axis=1)[:, None]


def opened(path, runtime):
    """What runs a graph: a function from inputs by name to all outputs, in order."""
    if runtime == "openvino":
        import openvino

        hints = {"EXECUTION_MODE_HINT": "ACCURACY"}  # torch's numbers: no bf16, activations not rounded
        compiled = openvino.compile_model(path, "CPU", hints)
        return lambda feeds: compiled(feeds).values()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda feeds: session.run(None, feeds)


class Model:
    """The graphs of one folder in one variant, by default the first."""

    def __init__(self, folder, variant=None, runtime="onnxruntime"):
        self.folder, self.runtime, self.running = Path(folder), runtime, {}
        self.manifest = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        files = [(graph["variant"], graph) for graph in self.manifest["artifacts"] if graph["format"] == "onnx"]
        self.graphs = {graph["graph"]: graph for name, graph in files if name == (variant or files[0][0])}
        self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        self.tokenizer.no_padding()

    def run(self, name, feeds):
        """Outputs by name; an input nobody gave is an empty cache, or a mask of ones."""
        graph, given = self.graphs[name], {}
        if name not in self.running:
            self.running[name] = opened(self.folder / graph["file"], self.runtime)
        for port in graph["inputs"]:
            sizes = [size if isinstance(size, int) else int("sequence" not in size) for size in port["shape"]]
            value = feeds.get(port["name"], np.full(sizes, not port["name"].startswith("past")))
            given[port["name"]] = value.astype(port["dtype"])
        return dict(zip([port["name"] for port in graph["outputs"]], self.running[name](given), strict=True))

    def answer(self, image, question, max_new_tokens=32):
        """The most probable answer."""
        run, generation = self.manifest["run"], self.manifest["generation"]
        features = self.run("vision_encoder", {"pixel_values": pixels(image, run["image"])})["image_features"]
        tiles = features[..., 0].size // run["prompt"]["image_ids"].count(generation["image_token"])
        ids = prompt_ids(self.tokenizer, question, run["prompt"], tiles)
        is_image = ids == generation["image_token"]
        embeds = self.run("embed_tokens", {"input_ids": np.where(is_image, 0, ids)})["inputs_embeds"].copy()
        embeds[is_image] = features.reshape(-1, features.shape[-1])
        place, cache, tokens = positions(ids, generation, run["image"].get("grid")), {}, []
        following, total = int(place.max()) + 1, ids.shape[1]
        if generation["kind"] == "encoder-decoder":
            cache = self.run("encoder_model", {"inputs_embeds": embeds, "attention_mask": np.ones((1, total))})
            cache["encoder_attention_mask"], total = np.ones((1, total)), 0
            embeds = self.run("embed_tokens", {"input_ids": np.array([[generation["start"]]])})["inputs_embeds"]
        while len(tokens) < max_new_tokens and not set(tokens) & set(generation["end"]):
            cache = {name.replace("present", "past_key_values"): value for name, value in cache.items()}
            step = {"inputs_embeds": embeds, "attention_mask": np.ones((1, total)), "position_ids": place}
            outputs = self.run("decoder_model_merged", {**cache, **step})
            tokens.append(int(outputs.pop("logits")[0, -1].argmax()))
            cache, total = {**cache, **outputs}, total + 1
            embeds = self.run("embed_tokens", {"input_ids": np.array([tokens[-1:]])})["inputs_embeds"]
            place = np.full((*place.shape[:-1], 1), following + len(tokens) - 1)
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image")
    parser.add_argument("question")
    parser.add_argument("--variant", help="of those in manifest.json")
    parser.add_argument("--runtime", choices=("onnxruntime", "openvino"), default="onnxruntime")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    given = parser.parse_args()
    model = Model(Path(__file__).parent, given.variant, given.runtime)
    sys.stdout.write(model.answer(Image.open(given.image), given.question, given.max_new_tokens) + "\n")
