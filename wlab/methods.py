# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The table of all methods: paper, kind, room, module, recipes, state cost.

Nothing but the standard library is imported here, so that the command line and
the documentation can read the table without loading jax.
"""

import difflib
from collections.abc import Iterable
from typing import Literal, NamedTuple

Family = Literal[
    "continual",
    "es",
    "generate",
    "grow",
    "merge",
    "optim",
    "peft",
    "probe",
    "prune",
    "quant",
]
Kind = Literal["transform", "reparameterisation", "strategy", "map", "measure"]

KINDS: dict[Kind, str] = {
    "transform": "how a weight moves",
    "reparameterisation": "what a weight is",
    "strategy": "how weights are searched without gradients",
    "map": "parameters to parameters, once",
    "measure": "nothing: it looks",
}
"""What a method of each kind changes."""

RECIPES: dict[str, str] = {
    "awq": "wlab.recipes.awq",
    "bone": "wlab.recipes.bone",
    "classp": "wlab.recipes.classp",
    "countdown": "wlab.recipes.countdown",
    "d2quant": "wlab.recipes.d2quant",
    "drop-muon": "wlab.recipes.drop_muon",
    "eco": "wlab.recipes.eco",
    "eco-quadratic": "wlab.recipes.eco_quadratic",
    "egg-lm": "wlab.recipes.egg_lm",
    "eggroll": "wlab.recipes.eggroll",
    "es-rl": "wlab.recipes.es_rl",
    "frugal": "wlab.recipes.frugal",
    "gptaq": "wlab.recipes.gptaq",
    "gptq": "wlab.recipes.gptq",
    "hut": "wlab.recipes.hut",
    "ist": "wlab.recipes.ist",
    "layerwise": "wlab.recipes.layerwise",
    "lisa": "wlab.recipes.lisa",
    "lora": "wlab.recipes.lora",
    "mup-wd": "wlab.recipes.mup_wd",
    "optimizers": "wlab.recipes.optimizers",
    "peft": "wlab.recipes.peft",
    "quantlrm": "wlab.recipes.quantlrm",
    "ptq": "wlab.recipes.ptq",
    "randlora": "wlab.recipes.randlora",
    "rescomp": "wlab.recipes.rescomp",
    "rsq": "wlab.recipes.rsq",
    "s2ft": "wlab.recipes.s2ft",
    "snella": "wlab.recipes.snella",
    "synapse": "wlab.recipes.synapse",
    "tera": "wlab.recipes.tera",
    "wara": "wlab.recipes.wara",
}
"""The module of each recipe that ``wlab run`` knows."""


class Method(NamedTuple):
    """One method and the paper it comes from."""

    slug: str  # the name on the command line, in tests and in tables
    title: str  # title of the paper
    arxiv: str  # arXiv identifier without version
    year: int  # year of the first version
    family: Family  # the room, a folder of wlab
    kind: Kind
    summary: str  # what it does, in one sentence
    state: str  # what it stores beside, or instead of, the float32 weights
    venue: str = ""  # where it was published, "" for a preprint
    module: str = ""  # dotted path, "" until it exists
    recipes: tuple[str, ...] = ()  # names in RECIPES
    ready: bool = False


_METHODS = (
    Method(
        slug="awq",
        title=(
            "AWQ: Activation-aware Weight Quantization for LLM Compression and "
            "Acceleration"
        ),
        arxiv="2306.00978",
        year=2023,
        venue="MLSys 2024",
        family="quant",
        kind="map",
        summary=(
            "Scales up the input channels that carry large activations, with an "
            "exponent found on a grid, before rounding to nearest."
        ),
        state="0.52 bytes a weight at 4 bits in groups of 128; the scales are folded",
        module="wlab.quant",
        recipes=("awq",),
        ready=True,
    ),
    Method(
        slug="bitstack",
        title=(
            "BitStack: Fine-Grained Size Control for Compressed LLMs in Variable "
            "Memory Environments"
        ),
        arxiv="2410.23918",
        year=2024,
        venue="ICLR 2025",
        family="quant",
        kind="map",
        summary=(
            "Peels each matrix into sign planes times a low-rank magnitude and "
            "sorts the pieces of all layers, so that any size can be loaded."
        ),
        state="about 1.1 bits a weight for each block loaded, 16 blocks in all",
    ),
    Method(
        slug="bone",
        title=(
            "Block Affine Transformation as Parameter Efficient Fine-tuning "
            "Methods for Large Language Models"
        ),
        arxiv="2409.15371",
        year=2024,
        family="peft",
        kind="reparameterisation",
        summary=(
            "Trains one block that all row blocks of a weight share, added to "
            "them (Bone) or multiplied with them as well (Bat)."
        ),
        state="r numbers an output column and their Adam moments, 12 bytes each",
        module="wlab.peft",
        recipes=("bone",),
        ready=True,
    ),
    Method(
        slug="ciwgan-fc",
        title=(
            "Exploring the encoding of linguistic representations in the "
            "Fully-Connected Layer of generative CNNs for Speech"
        ),
        arxiv="2501.07726",
        year=2025,
        family="probe",
        kind="measure",
        summary=(
            "Plays single columns and edited rows of a speech generator's first "
            "layer through its convolutions, to hear what each latent encodes."
        ),
        state="none",
    ),
    Method(
        slug="classp",
        title=(
            "CLASSP: a Biologically-Inspired Approach to Continual Learning "
            "through Adjustment Suppression and Sparsity Promotion"
        ),
        arxiv="2405.09637",
        year=2024,
        family="optim",
        kind="transform",
        summary=(
            "Slows each weight by the gradients it has accumulated and moves it "
            "only when its gradient passes a threshold."
        ),
        state="4 bytes a parameter, against 8 for Adam",
        module="wlab.optim",
        recipes=("classp",),
        ready=True,
    ),
    Method(
        slug="d2quant",
        title="D2Quant: Accurate Low-bit Post-Training Weight Quantization for LLMs",
        arxiv="2602.02546",
        year=2026,
        venue="NeurIPS 2026",
        family="quant",
        kind="map",
        summary=(
            "Gives down projections a second scale that the up projection absorbs "
            "and corrects the mean shift of activations in the norm's bias."
        ),
        state="2 or 3 bits a weight and group scales; the second scale is folded",
        module="wlab.quant",
        recipes=("d2quant",),
        ready=True,
    ),
    Method(
        slug="dkvb",
        title="Discrete Key-Value Bottleneck",
        arxiv="2207.11240",
        year=2022,
        venue="ICML 2023",
        family="continual",
        kind="map",
        summary=(
            "Puts frozen codebook keys with trainable values between an encoder "
            "and its head, so that learning touches only the fetched values."
        ),
        state="4 bytes an entry of keys and values, about 100 MB at its defaults",
    ),
    Method(
        slug="drop-muon",
        title="Drop-Muon: Update Less, Converge Faster",
        arxiv="2510.02239",
        year=2025,
        family="optim",
        kind="transform",
        summary=(
            "Applies Muon to a random subset of the layers at each step, often a "
            "suffix, so that the rest of the backward pass is never run."
        ),
        state="4 bytes a parameter, the momentum",
        module="wlab.optim",
        recipes=("drop-muon",),
        ready=True,
    ),
    Method(
        slug="eco",
        title="ECO: Quantized Training without Full-Precision Master Weights",
        arxiv="2601.22101",
        year=2026,
        venue="ICML 2026",
        family="optim",
        kind="transform",
        summary=(
            "Trains quantised weights alone: what each rounding loses goes into "
            "the optimiser's momentum instead of into a master copy."
        ),
        state="9 bytes a parameter in FP8 with Adam, 8.5 in INT4, against 12",
        module="wlab.optim",
        recipes=("eco", "eco-quadratic"),
        ready=True,
    ),
    Method(
        slug="eggroll",
        title="Evolution Strategies at the Hyperscale",
        arxiv="2511.16652",
        year=2025,
        family="es",
        kind="strategy",
        summary=(
            "Perturbs every matrix of each member of a population by a low-rank "
            "product, so that one shared matrix product serves all members."
        ),
        state="none with SGD, 8 bytes a parameter with Adam; noise comes from keys",
        module="wlab.es",
        recipes=("eggroll", "egg-lm", "es-rl", "countdown"),
        ready=True,
    ),
    Method(
        slug="elastic-ttt",
        title="Fast Spatial Memory with Elastic Test-Time Training",
        arxiv="2604.07350",
        year=2026,
        family="continual",
        kind="transform",
        summary=(
            "Pulls weights that learn during inference back to a moving anchor, "
            "each as strongly as its running importance says."
        ),
        state="12 bytes a fast weight: the weight, its anchor, its importance",
    ),
    Method(
        slug="ewc-lora",
        title=(
            "Language Models Meet World Models: Embodied Experiences Enhance "
            "Language Models"
        ),
        arxiv="2305.10626",
        year=2023,
        venue="NeurIPS 2023",
        family="continual",
        kind="transform",
        summary=(
            "Penalises the merged update of a low-rank adapter by the Fisher "
            "information of the frozen weight it is added to."
        ),
        state="4 bytes an adapted weight for the Fisher, 1 in int8",
    ),
    Method(
        slug="flexround",
        title=(
            "FlexRound: Learnable Rounding based on Element-wise Division for "
            "Post-Training Quantization"
        ),
        arxiv="2306.00317",
        year=2023,
        venue="ICML 2023",
        family="quant",
        kind="map",
        summary=(
            "Learns, block by block, a divisor for every weight before rounding, "
            "so that large weights may jump several steps of the grid."
        ),
        state="12 bytes a weight of one block while it learns, nothing after",
    ),
    Method(
        slug="frugal",
        title=(
            "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for "
            "Scalable Training"
        ),
        arxiv="2411.07837",
        year=2024,
        venue="ICML 2025",
        family="optim",
        kind="transform",
        summary=(
            "Splits each gradient: a chosen part goes to AdamW, the rest to a "
            "sign step without state, so that every update has full rank."
        ),
        state="8 bytes a parameter of the chosen share, none for the rest",
        module="wlab.optim",
        recipes=("frugal",),
        ready=True,
    ),
    Method(
        slug="hut",
        title=(
            "HUT: A More Computation Efficient Fine-Tuning Method With Hadamard "
            "Updated Transformation"
        ),
        arxiv="2409.13501",
        year=2024,
        family="peft",
        kind="reparameterisation",
        summary=(
            "Multiplies the frozen weight, entry by entry, by a low-rank mask and "
            "scales and shifts the output features."
        ),
        state="r (in + out) + 2 out numbers a matrix and their moments",
        module="wlab.peft",
        recipes=("hut",),
        ready=True,
    ),
    Method(
        slug="hy-wu",
        title=(
            "HY-WU (Part I): An Extensible Functional Neural Memory Framework and "
            "An Instantiation in Text-Guided Image Editing"
        ),
        arxiv="2603.07236",
        year=2026,
        family="generate",
        kind="reparameterisation",
        summary=(
            "Lets a transformer write a low-rank adapter for every layer from "
            "each instance's condition, trained through the task's own loss."
        ),
        state="the generator; an adapter is r (in + out) numbers an instance",
    ),
    Method(
        slug="ist",
        title=(
            "Layer-wise Importance Matters: Less Memory for Better Performance in "
            "Parameter-efficient Fine-tuning of Large Language Models"
        ),
        arxiv="2410.11772",
        year=2024,
        venue="Findings of EMNLP 2024",
        family="peft",
        kind="transform",
        summary=(
            "Scores layers by how the loss reacts when their adapters are "
            "suppressed and trains only a sampled quarter at each step."
        ),
        state="one number a layer and a key",
        module="wlab.peft",
        recipes=("ist",),
        ready=True,
    ),
    Method(
        slug="know",
        title=(
            "Learning from Oblivion: Predicting Knowledge-Overflowed Weights via "
            "Retrodiction of Forgetting"
        ),
        arxiv="2508.05059",
        year=2025,
        venue="CVPR 2026",
        family="generate",
        kind="map",
        summary=(
            "Reads how weights drift while data shrinks and predicts, backwards, "
            "the weights that more data would have given."
        ),
        state="20 bytes a parameter for five snapshots, unless streamed",
    ),
    Method(
        slug="layer-geometry",
        title="On the Geometric Structure of Layer Updates in Deep Language Models",
        arxiv="2604.02459",
        year=2026,
        family="probe",
        kind="measure",
        summary=(
            "Splits each layer's update into what a map on single tokens explains "
            "and a residual, and asks which of them the output needs."
        ),
        state="none",
    ),
    Method(
        slug="layerdecomp",
        title="Generative Image Layer Decomposition with Visual Effects",
        arxiv="2411.17864",
        year=2024,
        venue="CVPR 2025",
        family="generate",
        kind="map",
        summary=(
            "Denoises an image's background and its object with shadow as two "
            "layers that must compose to the picture again."
        ),
        state="that of its optimiser; two frozen autoencoders beside the denoiser",
    ),
    Method(
        slug="layerwise-quant",
        title=(
            "Layer-Wise Quantization: A Pragmatic and Effective Method for "
            "Quantizing LLMs Beyond Integer Bit-Levels"
        ),
        arxiv="2406.17415",
        year=2024,
        venue="Findings of ACL 2025",
        family="quant",
        kind="measure",
        summary=(
            "Ranks blocks by how much they change their input, or by their "
            "outliers, and spends a fractional bit budget in that order."
        ),
        state="one integer a block",
        module="wlab.quant",
        recipes=("layerwise",),
        ready=True,
    ),
    Method(
        slug="lisa",
        title=(
            "LISA: Layerwise Importance Sampling for Memory-Efficient Large "
            "Language Model Fine-Tuning"
        ),
        arxiv="2403.17919",
        year=2024,
        venue="NeurIPS 2024",
        family="optim",
        kind="transform",
        summary=(
            "Trains the embedding, the head and a few middle layers that are "
            "drawn anew every K steps, and freezes the others."
        ),
        state="8 bytes a parameter of the active layers and both ends",
        module="wlab.optim",
        recipes=("lisa",),
        ready=True,
    ),
    Method(
        slug="mixture-growth",
        title=(
            "MixtureGrowth: Growing Neural Networks by Recombining Learned Parameters"
        ),
        arxiv="2311.04251",
        year=2023,
        venue="WACV 2024",
        family="grow",
        kind="reparameterisation",
        summary=(
            "Builds layers as mixtures of templates and doubles a network's width "
            "by new mixtures of the templates it has learned."
        ),
        state="none: two templates a half are the dense layer's size",
    ),
    Method(
        slug="mup-wd",
        title="Robust Layerwise Scaling Rules by Proper Weight Decay Tuning",
        arxiv="2510.15262",
        year=2025,
        family="optim",
        kind="transform",
        summary=(
            "Scales weight decay by the square root of width beside muP's "
            "learning rates, so that both carry over from a small model."
        ),
        state="none beyond Adam's",
        module="wlab.optim",
        recipes=("mup-wd",),
        ready=True,
    ),
    Method(
        slug="muscle",
        title="MUSCLE: A Model Update Strategy for Compatible LLM Evolution",
        arxiv="2407.09435",
        year=2024,
        venue="Findings of EMNLP 2024",
        family="continual",
        kind="measure",
        summary=(
            "Counts what an update of the base model breaks, and distils the old "
            "model where the student errs, to break less."
        ),
        state="one adapter; the old and the new model only while it trains",
    ),
    Method(
        slug="ofq",
        title="Oscillation-free Quantization for Low-bit Vision Transformers",
        arxiv="2302.02210",
        year=2023,
        venue="ICML 2023",
        family="quant",
        kind="reparameterisation",
        summary=(
            "Keeps weights from flipping between two codes in training: scales "
            "from statistics, annealed freezing, queries and keys as one product."
        ),
        state="none for its scales; 10 bytes a parameter to track oscillation",
    ),
    Method(
        slug="opcm",
        title=(
            "Merging Models on the Fly Without Retraining: A Sequential Approach "
            "to Scalable Continual Model Merging"
        ),
        arxiv="2501.09522",
        year=2025,
        venue="NeurIPS 2025",
        family="merge",
        kind="map",
        summary=(
            "Merges fine-tuned models one at a time: each task's change is "
            "projected away from the directions already used, then rescaled."
        ),
        state="the parent and one merged model, however many have come",
    ),
    Method(
        slug="projection-head",
        title=(
            "Investigating the Benefits of Projection Head for Representation Learning"
        ),
        arxiv="2403.11391",
        year=2024,
        venue="ICLR 2024",
        family="probe",
        kind="measure",
        summary=(
            "Computes how features are weighted before and after a projection "
            "head, and offers a fixed reweighting in the head's place."
        ),
        state="none: the fixed head has no trained numbers",
    ),
    Method(
        slug="pvq",
        title="Pyramid Vector Quantization for LLMs",
        arxiv="2410.16926",
        year=2024,
        family="quant",
        kind="map",
        summary=(
            "Codes each group of weights as a point on an integer pyramid, known "
            "by its index alone, times a quantised length."
        ),
        state="2.25 bits a weight in groups of 16, and 4 bytes a row",
    ),
    Method(
        slug="quantlrm",
        title=(
            "QuantLRM: Quantization of Large Reasoning Models via Fine-Tuning Signals"
        ),
        arxiv="2602.02581",
        year=2026,
        family="quant",
        kind="map",
        summary=(
            "Takes the importance of input channels from what fine-tuning "
            "changed most and least, and searches AWQ's scales with it."
        ),
        state="as AWQ, about 0.4 bytes a weight at 3 bits; the base only to calibrate",
        module="wlab.quant",
        recipes=("quantlrm",),
        ready=True,
    ),
    Method(
        slug="randlora",
        title=("RandLoRA: Full-rank parameter-efficient fine-tuning of large models"),
        arxiv="2502.00987",
        year=2025,
        venue="ICLR 2025",
        family="peft",
        kind="reparameterisation",
        summary=(
            "Sums frozen random low-rank products, each with trained diagonal "
            "scales, into an update of full rank."
        ),
        state="n (r + d) trained numbers a matrix; random bases that all layers share",
        module="wlab.peft",
        recipes=("randlora",),
        ready=True,
    ),
    Method(
        slug="rd-prune",
        title="Efficient Joint Optimization of Layer-Adaptive Weight Pruning",
        arxiv="2308.10438",
        year=2023,
        venue="ICCV 2023",
        family="prune",
        kind="map",
        summary=(
            "Measures each layer's output distortion against its pruning ratio "
            "and solves the best split of a sparsity budget exactly."
        ),
        state="1 bit a prunable weight",
    ),
    Method(
        slug="rescomp",
        title=("Rethinking Residual Errors in Compensation-based LLM Quantization"),
        arxiv="2604.07955",
        year=2026,
        venue="ICLR 2026",
        family="quant",
        kind="map",
        summary=(
            "Quantises column by column as GPTQ and GPTAQ do, and also feeds back "
            "how far compensation has moved the weights."
        ),
        state="codes and group scales; a Hessian and a cross term while it runs",
        module="wlab.quant",
        recipes=("gptq", "gptaq", "rescomp"),
        ready=True,
    ),
    Method(
        slug="rsq",
        title="RSQ: Learning from Important Tokens Leads to Better Quantized LLMs",
        arxiv="2503.01820",
        year=2025,
        family="quant",
        kind="map",
        summary=(
            "Rotates the residual stream, weighs calibration tokens by the "
            "attention they receive, then runs GPTQ."
        ),
        state="as GPTQ; the rotations are fused",
        module="wlab.quant",
        recipes=("rsq",),
        ready=True,
    ),
    Method(
        slug="rws",
        title=(
            "Robust Weight Signatures: Gaining Robustness as Easy as Patching Weights?"
        ),
        arxiv="2302.12480",
        year=2023,
        venue="ICML 2023",
        family="merge",
        kind="map",
        summary=(
            "Extracts what training on a corruption changed beyond clean training "
            "and adds it, scaled, to other models of the architecture."
        ),
        state="b bits a parameter of the few kept layers",
    ),
    Method(
        slug="s2ft",
        title=(
            "S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by "
            "Structured Sparsity"
        ),
        arxiv="2412.06289",
        year=2024,
        venue="NeurIPS 2024",
        family="peft",
        kind="reparameterisation",
        summary=(
            "Trains a few attention heads and feed-forward channels of each block "
            "as dense slices of full rank."
        ),
        state="the slices and their moments, 12 bytes a selected weight",
        module="wlab.peft",
        recipes=("s2ft",),
        ready=True,
    ),
    Method(
        slug="shiftaddllm",
        title="ShiftAddLLM: Post-Training Multiplication-Less Reparameterization",
        arxiv="2406.05981",
        year=2024,
        venue="NeurIPS 2024",
        family="quant",
        kind="map",
        summary=(
            "Writes weights as binary matrices with scales that are powers of "
            "two, fitted under the output error, so that no product remains."
        ),
        state="q bits a weight and 16 q bits of scales a group",
    ),
    Method(
        slug="snella",
        title=(
            "Kernelized Sparse Fine-Tuning with Bi-level Parameter Competition "
            "for Vision Models"
        ),
        arxiv="2510.24037",
        year=2025,
        family="peft",
        kind="reparameterisation",
        summary=(
            "Makes a dense update from two small matrices by a nonlinear kernel "
            "and lets its entries, and then the layers, compete to stay."
        ),
        state="q (in + out) numbers a matrix and their moments; the mask is not kept",
        module="wlab.peft",
        recipes=("snella",),
        ready=True,
    ),
    Method(
        slug="sws-learngene",
        title=(
            "Exploring Learngene via Stage-wise Weight Sharing for Initializing "
            "Variable-sized Models"
        ),
        arxiv="2404.16897",
        year=2024,
        venue="IJCAI 2024",
        family="grow",
        kind="map",
        summary=(
            "Distils one shared layer for each stage, from which networks of any "
            "depth are started by repeating it."
        ),
        state="one layer a stage instead of one a block",
    ),
    Method(
        slug="synapse",
        title=(
            "Adaptive Learning Rule for Hardware-based Deep Neural Networks Using "
            "Electronic Synapse Devices"
        ),
        arxiv="1707.06381",
        year=2017,
        venue="Neural Computing and Applications 2019",
        family="optim",
        kind="transform",
        summary=(
            "Learns on pairs of analog devices by single pulses that only ever "
            "raise a conductance, fired where the gradient passes a threshold."
        ),
        state="two conductances a weight, no optimiser state",
        module="wlab.optim",
        recipes=("synapse",),
        ready=True,
    ),
    Method(
        slug="tera",
        title=(
            "TeRA: Vector-based Random Tensor Network for High-Rank Adaptation of "
            "Large Language Models"
        ),
        arxiv="2509.03234",
        year=2025,
        venue="ACL 2026",
        family="peft",
        kind="reparameterisation",
        summary=(
            "Folds the update into a tensor network with a random core and random "
            "factors, of which only the vectors on the bonds are trained."
        ),
        state="40 to 500 trained numbers a layer; a frozen core for each shape",
        module="wlab.peft",
        recipes=("tera",),
        ready=True,
    ),
    Method(
        slug="vcl-binary",
        title=(
            "Statistical mechanics of continual learning: variational principle "
            "and mean-field potential"
        ),
        arxiv="2212.02846",
        year=2022,
        venue="Physical Review E 2023",
        family="continual",
        kind="reparameterisation",
        summary=(
            "Trains the fields of a distribution over binary weights and ties "
            "each task to the last by the divergence between them."
        ),
        state="8 bytes a weight and the optimiser's; 1 bit when deployed",
    ),
    Method(
        slug="wa",
        title=("Maintaining Discrimination and Fairness in Class Incremental Learning"),
        arxiv="1911.07053",
        year=2019,
        venue="CVPR 2020",
        family="continual",
        kind="map",
        summary=(
            "Scales the head's rows of new classes so that their mean length "
            "agrees with that of the old ones."
        ),
        state="none; the previous model as a teacher while it trains",
    ),
    Method(
        slug="wara",
        title="WaRA: Wavelet Low Rank Adaptation",
        arxiv="2506.24092",
        year=2025,
        family="peft",
        kind="reparameterisation",
        summary=(
            "Puts low-rank factors in a wavelet domain and maps them back, for "
            "twice the rank at the same number of parameters."
        ),
        state="r (in + out) / 2 numbers a matrix and their moments",
        module="wlab.peft",
        recipes=("wara",),
        ready=True,
    ),
    Method(
        slug="weight-compander",
        title="Weight Compander: A Simple Weight Reparameterization for Regularization",
        arxiv="2306.16993",
        year=2023,
        family="peft",
        kind="reparameterisation",
        summary=(
            "Trains auxiliary weights behind a bounded odd function that is steep "
            "at zero, which thins out both tiny and huge weights."
        ),
        state="two numbers a layer; the optimiser's state is on the auxiliary weights",
    ),
)

METHODS: tuple[Method, ...] = tuple(
    sorted(_METHODS, key=lambda method: (method.family, method.slug))
)
"""All methods, by family and name."""


def near(name: str, names: Iterable[str]) -> str:
    """Says which of some names are close to a misspelt one.

    Args:
      name: What was asked for.
      names: What there is.

    Returns:
      ``"; did you mean a or b?"``, or ``""`` where nothing is close.

    Examples:
      >>> near("econ", ["eco", "lisa"])
      '; did you mean eco?'
    """
    close = difflib.get_close_matches(name.lower(), list(names), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def find(slug: str) -> Method:
    """Returns the method of a given name.

    Args:
      slug: Its name, as in the first column of ``wlab list``.

    Raises:
      ValueError: If there is none; the message lists the nearest names.

    Examples:
      >>> find("eco").arxiv
      '2601.22101'
    """
    for method in METHODS:
        if method.slug == slug:
            return method
    slugs = [method.slug for method in METHODS]
    raise ValueError(
        f"there is no method {slug!r}{near(slug, slugs) or '; see: wlab list'}"
    )


def markdown() -> str:
    """The table of all methods as the README has it."""
    rows = ["| method | paper | kind | room | state |", "|---|---|---|---|---|"]
    for m in METHODS:
        paper = f"[{m.title}](https://arxiv.org/abs/{m.arxiv})"
        name = f"**{m.slug}**" if m.ready else m.slug
        state = "ready" if m.ready else "to come"
        rows.append(f"| {name} | {paper} | {m.kind} | {m.family} | {state} |")
    return "\n".join(rows)
