r"""PixArt-Σ, the first of the paper's models: is LoRaQ better than SVDQuant at equal bytes?

    python experiments/pixart_sigma.py --source PixArt-alpha/PixArt-Sigma-XL-2-1024-MS --prompts meta_data.json \
        --images 1024 --workers 8
    python experiments/pixart_sigma.py --local-tiny          # random weights, a minute on a CPU: does it all run?

Quantizes the transformer in every configuration (`CONTENDERS` in `paper_study.py`), and lets `loraq
evaluate` draw and compare: each with the same prompts and seeds as the 16-bit model, by the protocol
of SVDQuant's tables (docs/evaluation.md), activations rounded as the recipe says. Prints one table,
and what others published (`published.toml`) beside. An interrupted run goes on with the models and
images that are there. Published setting: 20 steps of the DPM solver, guidance 4.5, fp16.

Expected. LoRaQ (arXiv 2604.18117) reports better scores than SVDQuant at equal memory overhead on
this model, with the branches W8A8, W6A6 and W4A8; the cells of its tables are not known to us, so
there is no figure of its own to meet. SVDQuant's rows use 128 calibration prompts and smoothing; the
`svdquant` of this package is data-free and without smoothing, so it can be worse. `svdquant-x100` has
100 alternations, and a row for each branch of LoRaQ's. No row has statistics of samples. The same
configuration differs by 1 dB between the harnesses of others: compare inside one run only.
"""

from paper_study import Study, main
from tiny_pipelines import tiny_pixart_sigma

STUDY = Study(
    name="pixart-sigma",
    hub_id="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    call={"num_inference_steps": 20, "guidance_scale": 4.5, "clean_caption": False},
    dtype="float16",
    tiny=tiny_pixart_sigma,
    tiny_call={
        "num_inference_steps": 4,
        "height": 32,
        "width": 32,
        "use_resolution_binning": False,
        "max_sequence_length": 32,
    },
)

if __name__ == "__main__":
    main(STUDY)
