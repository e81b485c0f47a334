"""Why each sentence is said, and what to do: the table that docs/troubleshooting.md is made of.

A sentence belongs to the first cause of which a pattern is found in it. Whoever adds an error writes it
so that it falls under a cause that is here, or adds a pattern, or a cause: tests/test_handbook.py names
the sentence.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cause:
    """What sentences have in common."""

    title: str
    why: str
    commands: tuple[str, ...]
    """What mends it, capitals standing for your own; none where the sentence says all there is."""
    patterns: tuple[str, ...]
    """Regular expressions; in a sentence ``…`` is what is filled in."""


CAUSES = (
    Cause(
        "Nothing is installed that runs it",
        "Extras bring what draws, serves, exports and measures; without one its first use names the "
        "command, in the form of your own installation. ONNX Runtime's builds for CPU and for CUDA exclude "
        "each other.",
        ("pip install -e '.[cpu]'", "pip install -e '.[cuda]'"),
        (
            "install it with",
            "install what it needs with",
            "is installed in part",
            "no inference library is installed",
            "has no CUDA provider",
            "comes with JetPack",
            "holds no TensorRT",
            "expected TensorRT … or newer",
            "nor TensorRT-RTX is here",
        ),
    ),
    Cause(
        "The GPU or its driver",
        "There is no NVIDIA GPU, it is hidden (`CUDA_VISIBLE_DEVICES`), its driver is older than the "
        "libraries, or it is older than what the libraries have kernels for. The CPU draws the same bundle.",
        ("nvidia-smi", 'hart-run --engine BUNDLE --device cpu "PROMPT"'),
        (
            "found no CUDA GPU",
            "CUDA cannot be used",
            "could not start its CUDA provider",
            "has kernels from compute capability",
            "there is no such GPU",
            "^--compute-capability: …, found …$",
            "^--device cuda: …$",
            "the NVIDIA driver is for CUDA",
            "^CUDA: …$",
            "found none$(?<=on the GPU it builds for, and found none)",
            "nothing was run; on a machine with one",
            "expected a number for N",
        ),
    ),
    Cause(
        "Not enough memory",
        "Pictures drawn at once need memory each, and so does every thread. What a bundle needs is known "
        "before it is exported; int8 needs the least on a CPU, fp16 on a GPU.",
        ('hart-run --engine BUNDLE --batch 1 "PROMPT"', "hart-export CHECKPOINT --dry-run"),
        ("out of memory", "gave no room", "every graph has its own", "ask for fewer, or for fewer --cpus"),
    ),
    Cause(
        "A backend that does not run this bundle",
        "int8 bundles are for the CPU, engines for the GPU they were built for and for the batches and "
        "settings they were built with; ONNX Runtime draws everything.",
        (
            'hart-run --engine BUNDLE --backend onnxruntime "PROMPT"',
            "hart-export CHECKPOINT --precision fp16",
        ),
        (
            "--backend … runs on …",
            "^--backend …: engines are",
            "is an … bundle, which",
            "would lie at an address",
            "keeps at most",
            "which OpenVINO does not follow",
            "cannot be captured",
        ),
    ),
    Cause(
        "Engines that are missing, of another version, or built for something else",
        "Engines belong to one bundle, one kind of GPU, one version of TensorRT and a range of batches. "
        "They are built again in minutes; the bundle stays as it is.",
        ("hart-build --engine BUNDLE --backend tensorrt-rtx --force",),
        (
            "build (?:it|them|others|the engines) again",
            "build (?:it|them|others) with",
            "build the engines",
            "build engines for this batch",
            "expected two numbers from 1 to",
            "workspace: expected more than 0",
        ),
    ),
    Cause(
        "What runs the graphs failed",
        "What TensorRT, ONNX Runtime or OpenVINO itself says stands in the sentence. Another version of it, "
        "or another backend or device, may do better; ONNX Runtime on the CPU draws every bundle.",
        ('hart-run --engine BUNDLE --backend onnxruntime --device cpu "PROMPT"',),
        (
            "^graph …: …$",
            "cannot build an engine",
            "cannot parse it",
            "ignores (?:the inputs|part of)",
            "refuses",
            "could not (?:create its context|run its engine)",
            "wants the value of",
            "^--compute-capability: … builds",
        ),
    ),
    Cause(
        "No bundle there, or several",
        "`--engine` names a bundle, its `manifest.json`, or a folder that holds one. A checkpoint is none: "
        "`hart-export` makes one of it.",
        ("hart-export CHECKPOINT --output engines/NAME", 'hart-run --engine engines/NAME "PROMPT"'),
        (
            "no bundle here",
            "bundles, choose one",
            "expected a bundle folder",
            "--engine: expected a path",
            "engine is missing",
            "arguments: ",
            "expected either --url",
            "nothing to compare",
            "requests choose by name",
        ),
    ),
    Cause(
        "A bundle that was changed, cut off or made by another version",
        "Every file of a bundle has its size and hash in the manifest, and its graphs read nothing beside "
        "it. A copy that is not whole is copied again; one of another version is exported again from the "
        "checkpoint.",
        ("hart-export CHECKPOINT --output engines/NAME --force",),
        (
            "among its settings$",
            "export (?:the bundle|it) again(?!\\s+with)",
            "was changed while",
            "copy it here again",
            "leaves the bundle",
            "graphs read their weights",
            "not listed in files",
            "not a (?:bundle|readable) manifest",
            "noise: expected",
            "as the weights know",
            "patch_nums: expected sides, found",
            "max_batch: ",
            "llm is missing",
            "vocab_size: expected 1 to",
            "expected a hash for each piece",
            "digits of a sha256",
            "bytes, found …; refused",
            "^…: checkpoint: …",
            "may know it",
            "an ONNX graph",
            "expected (?:one graph|weights and nodes)",
            "^(?:weight|operators?|opset|input) ?(?:…|:)",
            "expected a tensor, found",
            "as the manifest says",
            "found no more|no more, found",
            "^…: … is missing",
            "is not what the plan",
            "another tensor than in the plan",
            "the loop (?:feeds|does not feed)",
            "names no padding; export",
            "expected another size than",
        ),
    ),
    Cause(
        "What was drawn is no picture",
        "Values became infinite or NaN, or all pixels are equal. Weights beyond half precision are the "
        "usual reason: float32 holds them. Nothing of that batch is written.",
        ("hart-export CHECKPOINT --precision fp32", "hart-compare --engine BUNDLE"),
        (
            "holds? NaN or infinity, there is no picture",
            "^decoder: ",
            "keys and values of the system prompt are not finite",
            "beyond the … of",
            "in a row failed",
            "it was drawing pictures",
            "latents that are not finite",
        ),
    ),
    Cause(
        "The hub",
        "The id does not exist or is gated, the network is not there, or `HF_HUB_OFFLINE` is set and the "
        "cache lacks the revision. A folder that was downloaded elsewhere does as well.",
        ("hf auth login", "hart-export FOLDER --text-encoder FOLDER"),
        (
            "the hub (?:did|does)",
            "gives whole files and no ranges",
            "not a hub id",
            "hub ids have revisions",
            "names a revision already",
            "there is no such file in",
            "expected a folder or a hub id",
            "the hub's cache",
        ),
    ),
    Cause(
        "The system prompt",
        "The published model was trained with a text before every prompt, which is not in its weights. Its "
        "file can be fetched elsewhere; `none` is for models that were trained without.",
        (
            "hart-export CHECKPOINT --system-prompt constants.py",
            "hart-export CHECKPOINT --system-prompt none",
        ),
        (
            "published system prompt",
            "^--system-prompt",
            "sets … to a string",
            "not Python source",
            "has sha256",
            "is the published text except",
        ),
    ),
    Cause(
        "No checkpoint there, or not the part that is looked for",
        "A HART is a folder with `llm/` and `tokenizer/` side by side, VAR and MAR are two files. Nothing "
        "is guessed where two things would do.",
        (
            "hart-export CHECKPOINT",
            "hart-export FOLDER/var_d16.pth --tokenizer FILE",
            "hart-export FOLDER/mar_base/checkpoint-last.pth --tokenizer FILE",
        ),
        (
            "not a HART checkpoint",
            "is a bundle, expected the checkpoint",
            "is a file; give the folder",
            "expected a transformer such as",
            "expected the image tokenizer",
            "no rule says which",
            "no such … (?:file|folder)",
            "HART's lies in",
            "VAR's files hold",
            "only MAR's files",
            "found a CHECKPOINT beside it",
            "the demo checkpoint has none",
            "is not the demo checkpoint",
            "its … weights are",
            "its name says",
            "what --against runs",
        ),
    ),
    Cause(
        "Weights that are missing, damaged or of another model",
        "Every tensor has to be there once, with the shape its configuration says, and readable as numbers "
        "alone: pickles are never run. Most often a download is not whole, or an index belongs to other "
        "shards.",
        ("hart-export CHECKPOINT --check --report report.json", "hf download OWNER/NAME --local-dir FOLDER"),
        (
            "does not fit the model",
            "would not be exported as it is",
            "a header of",
            "weight file",
            "is not as it was written",
            "dictionary of tensors",
            "is stored twice",
            "takes what is not finite",
            "is not named by",
            "says that … is in",
            "weight_map",
            "names the shard",
            "does not name … beside it",
            "beside shards",
            "no weights, expected",
            "several sets of weights",
            "expected averaged weights",
            "nothing is there; download it",
            "holds NaN or infinity, … of",
            "is …, but",
            "takes latents of",
            "no square of cells",
            "which has one …, found",
            "expected (?:lvl_1L|a square number|square numbers|… dimensions)",
            "^…: expected numbers, found",
            "positions of these levels",
            "level table",
        ),
    ),
    Cause(
        "Pictures of another size",
        "A bundle draws the sizes that it was exported with. Weights of a HART whose levels are embedded by "
        "their number draw smaller pictures, too, of any multiple of a cell of their image tokenizer; what "
        "it costs is in docs/sizes.md.",
        (
            "hart-export CHECKPOINT --size 1024 --size 512",
            'hart-run --engine BUNDLE --size 512 "PROMPT"',
        ),
        (
            "the pixels that this checkpoint was trained for",
            "only HART's whose levels are embedded",
            "expected each size once",
            "makes one that draws others",
            "engines draw a bundle's first size alone",
            "draws the bundle's first size",
        ),
    ),
    Cause(
        "A configuration that no model of ours has",
        "Sizes and kinds in `config.json` decide the graphs, so each is checked by name. What the published "
        "code does not run is refused.",
        ("hart-export CHECKPOINT --dry-run",),
        (
            "the published code runs no other",
            "has no product in its blocks with sides",
            "have no products in 8-bit",
            "no pyramid to change",
            "must be a (?:whole )?multiple",
            "must (?:divide|…hold)",
            "(?:at most|1 to) (?:100|…|10) (?:scales|levels)",
            "(?:no tensor says how many|^--heads: expected)",
            "tokens are made of",
            "features are … wide",
            "rotary positions",
            "full_attention",
            "rope_theta",
            "quantization_config",
            "otherwise elsewhere",
            "expected a multiple of",
            "sides that do not shrink",
            "(?:head_dim|model_type): expected",
            "depth and embed_dim",
            "^…: missing …$",
            "expected a shape of HART",
            "or a file; found neither",
            "expected an object …, found",
        ),
    ),
    Cause(
        "The text encoder and its tokenizer",
        "Prompts need a Qwen2 model with its `tokenizer.json`, of the width that the transformer expects. A "
        "bundle without one draws from text features alone.",
        ("hart-export CHECKPOINT --text-encoder PATH_OR_ID",),
        (
            "no text encoder",
            "tokenizer file",
            "tokenizer\\.json",
            "padding",
            "token (?:… has|that|of)",
            "tokens … have number",
            "number of a token",
            "two tokens a line",
            "have one number",
            "the vocabulary gives it",
            "an object with its content",
            "expected true or false",
            "text tokenizer",
            "half of a character",
        ),
    ),
    Cause(
        "Texts where classes are drawn, or classes where texts are",
        "A bundle draws either from prompts or from classes, as its checkpoint was trained.",
        ('hart-run --engine BUNDLE "PROMPT"', "hart-run --engine BUNDLE --label 207"),
        ("draws? (?:texts|classes)", "no classes", "label: is required", "prompt: is required"),
    ),
    Cause(
        "A class that there is not",
        "Classes have numbers, and names where the bundle holds them; several may share a name.",
        (
            "hart-run --engine BUNDLE --label 207",
            "hart-export CHECKPOINT --class-names FILE",
        ),
        (
            "^class …",
            "number or the name of a class",
            "number of another class",
            "expected a name",
            "a line for each of",
            "^label …: …$",
        ),
    ),
    Cause(
        "Pictures that are edited",
        "A given picture is kept but for what its mask, its transparency, `--outpaint` or `--vary` "
        "says, and needs a bundle with an image encoder. One that was drawn from another is drawn "
        "again with that one beside it.",
        (
            'hart-run --engine BUNDLE --image FILE.png --mask MASK.png "PROMPT"',
            "hart-export CHECKPOINT --output engines/NAME --force",
        ),
        (
            "^--(?:image|mask|outpaint|reconstruct|vary)",
            "--image",
            "takes no pictures",
            "^image: is required",
            "a PNG with transparency",
            "goes on from one picture",
            "expected a path",
            "pictures are edited here",
            "of a given picture",
            "tells of its mask",
            "from (?:another|no other) picture",
            "give a single one",
            "no picture in one of the formats",
            "… pixels, found",
            "pixels to the left",
        ),
    ),
    Cause(
        "The safety model",
        "Each prompt is asked about before anything is drawn, where a safety model is named. It reads "
        "texts, and what it refuses is not drawn.",
        ('hart-run --engine BUNDLE --safety-model google/shieldgemma-2b "PROMPT"',),
        (
            "--safety-model",
            "safety model",
            "answered prompt … with NaN",
            "without an answer",
            "^…: cannot be loaded \\(",
        ),
    ),
    Cause(
        "A picture that is to be drawn again",
        "The PNG carries prompt, seed and settings, which stand for the same picture with the bundle and "
        "the version of random numbers that drew it. Programs that save it anew may lose them.",
        ("hart-run --engine BUNDLE --from-image FILE.png",),
        (
            "not drawn by hart-run",
            "prompt and seed are damaged",
            "was drawn with bundle",
            "seed stands for random",
            "brings its own prompt",
        ),
    ),
    Cause(
        "Comparisons with the reference",
        "A reference is recorded for one checkpoint, one system prompt and one list of scales, and read "
        "whole.",
        ("hart-compare --engine BUNDLE --checkpoint CHECKPOINT --save-reference FOLDER",),
        (
            "make (?:it|the reference) again",
            "^--reference",
            "was recorded with",
            "(?:the|no) recording",
            "recorded pictures",
            "a picture for each of",
            "expected … in it",
            "axes, the first",
            "rows of a table",
            "needs the model itself",
            "^…, graph …: …$",
            "the rehearsal",
            "ended with …: …; see",
        ),
    ),
    Cause(
        "Prompts",
        "A prompt is a text of at least one character, in UTF-8 where it comes from a file. Files made by "
        "some editors are UTF-16.",
        ('hart-run --engine BUNDLE "PROMPT"', "hart-run --engine BUNDLE --prompts-file FILE"),
        (
            "^prompt",
            "^no prompt",
            "holds no prompt",
            "^--prompt: ",
            "^expected text, found",
            "UTF-8",
            "UTF-16",
            "surrogate",
            "other prompts",
            "prompts are there",
        ),
    ),
    Cause(
        "Rows of hart-batch and the run they belong to",
        "A row has a prompt or a label, and settings under their names. A folder belongs to one run: the "
        "same command goes on with it, another needs another folder.",
        ("hart-batch FILE --engine BUNDLE --output OTHER",),
        (
            "row …",
            "stands there twice",
            "expected … or label",
            "no run of hart-batch",
            "another run",
            "another hart-batch",
            "as number, found",
        ),
    ),
    Cause(
        "Distances of pictures (FID)",
        "A distance is of pictures of one size, with Inception's weights of 2015 and statistics as the "
        "evaluation suites write them.",
        ("python -m hart_runtime.compare.frechet --help",),
        (
            "Inception",
            "expected pictures",
            "mu and sigma",
            "statistics",
            "of one size",
            "features of its pictures",
        ),
    ),
    Cause(
        "Ray",
        "All nodes have the same Python, Ray and hart-runtime, and the bundle lies on each or is pushed.",
        ("hart-batch FILE --engine BUNDLE --output FOLDER --ray local",),
        ("Ray", "^--ray", "^node …", "HOST:PORT"),
    ),
    Cause(
        "Where it would be written",
        "Nothing that is not a result of the same kind is replaced, and what is replaced is asked for with "
        "`--force`. Everything is written beside its place and renamed when whole.",
        ("hart-export CHECKPOINT --output engines/OTHER", "hart-export CHECKPOINT --force"),
        (
            "(?:is )?not replaced",
            "exists already",
            "would be (?:lost|replaced)",
            "could not be written",
            "cannot be (?:written|kept|replaced)",
            "write-protected",
            "give another --output",
            "the folder … does not exist",
            "expected a folder, found",
            "expected a file, found a folder",
            "file ending in \\.png",
            "the bundle, which holds no other",
            "which cannot be replaced",
        ),
    ),
    Cause(
        "A file that cannot be read",
        "It is not there, not allowed to be read, or not what its name says.",
        ("ls -l FILE",),
        (
            "no such file",
            "cannot be read",
            "not (?:a readable|readable as|a regular)",
            "expected a JSON object, found …$(?<!body: expected a JSON object, found …)",
            "ends in",
        ),
    ),
    Cause(
        "Settings of a drawing",
        "Settings have ranges, some of which are the model's; some models lack some. The bundle's own are "
        "those of the published sampler.",
        ("hart-run --engine BUNDLE --help",),
        (
            "^--(?:steps|keep|prune|top-k|preset|layers)",
            "^(?:features|mask)",
            "^--…",
            "expected … for each picture",
            "expected the places of … tokens",
            "\\(the …s of",
        ),
    ),
    Cause(
        "In Python",
        "A pipeline belongs to the process and the drawing that it is used in.",
        (),
        (
            "^a pipe",
            "forked",
            "being drawn here already",
            "drawing has gone on",
        ),
    ),
    Cause(
        "Words and numbers of the command line",
        "The option takes another kind of word. Every command tells of its options.",
        ("hart-run --help",),
        (
            "is empty",
            "no finite number",
            "expected a number",
            "expected numbers such as",
            "expected one of",
            "did you mean",
            "^…: expected …$",
            "unknown …; there are",
            "bundle's maximum",
            "^--batch: expected numbers",
            "are for --engine",
            "is of --check",
        ),
    ),
    Cause(
        "hart-serve does not start",
        "The port is taken, or others than this machine could ask without a key.",
        (
            "hart-serve --engine BUNDLE --port 8123",
            "hart-serve --engine BUNDLE --host 0.0.0.0 --api-key-file FILE",
        ),
        ("everybody there could draw", "could draw; give", "cannot be listened to", "an API key in one line"),
    ),
    Cause(
        "A request that hart-serve refuses",
        "The answer names the field, what was found and what is allowed; docs/serving.md has every field. "
        "Keys are sent as `Authorization: Bearer KEY`.",
        ("curl -sf http://127.0.0.1:8000/v1/models",),
        (
            "^the body",
            "^Content-Type",
            "^(?:Host|Origin|Authorization)",
            "^model: ",
            "or auto\\)",
            "for jpeg and webp",
            "needs stream",
            "at most … characters, found …$",
            "^expected … to …, found",
            "^expected …, found (?:…|text \\(…\\))(?:: …)?$",
            "in the form twice",
            "^variations",
            "^… draws …, found",
            "^…; found …",
            "^label is …",
        ),
    ),
    Cause(
        "A server that is busy, ends, or failed",
        "Requests beyond the queue are told to wait, a drawing that takes too long is given up, and why one "
        "failed is in the server's log.",
        ("hart-serve --engine BUNDLE --queue 256 --timeout 1200 --workers 2",),
        (
            "are waiting and there is no room",
            "shutting down",
            "not drawn within",
            "the drawing failed",
        ),
    ),
    Cause(
        "Measurements that cannot be made",
        "What is measured has to run by itself first, and results are read by the version that wrote them.",
        ("hart-bench --engine BUNDLE --iterations 3 --output FOLDER",),
        (
            "(?:measure|predict) again",
            "--url",
            "another such run",
            "a time such as",
            "^--sustained",
            "beside --sustained",
            "hart-(?:run failed|serve ended)",
            "not the pictures of hart-run",
            "the server does not say",
            "neither with a picture nor with 429",
            "further from the prediction",
            "nobody is answered",
            "several batch sizes",
            "prediction of one number",
            "not a result of hart-bench",
            "upgrade hart-runtime",
            "fresh process",
            "could not be described",
            "parts failed",
            "took longer than",
        ),
    ),
    Cause(
        "A value in a file",
        "A manifest, a configuration or a table holds something else than it may: the sentence has the "
        "place within it, what was expected and what was found. Files of bundles are not edited by hand.",
        ("hart-export CHECKPOINT --output engines/NAME --force",),
        ("expected (?:a list|an object|…|0|at most 255 characters)",),
    ),
)
"""From what is said by name to what is said of anything."""
