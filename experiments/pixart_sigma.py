r"""PixArt-Σ, the first of the paper's models: is LoRaQ better than SVDQuant at equal bytes?

    python experiments/pixart_sigma.py --source PixArt-alpha/PixArt-Sigma-XL-2-1024-MS --prompts meta_data.json \
        --images 1024 --workers 8
    python experiments/pixart_sigma.py --local-tiny          # random weights, a minute on a CPU: does it all run?

Quantizes the transformer in every configuration (`CONFIGURATIONS` in `paper_study.py`), loads each
with diffusers' own `from_pretrained`, generates with the same prompts and seeds as the 16-bit
model, and prints one table. An interrupted run goes on with the models that are written. Published
setting: 20 steps of the DPM solver, guidance 4.5.

Expected. LoRaQ (arXiv 2604.18117) reports better scores than SVDQuant at equal memory overhead on
this model, with the branches W8A8, W6A6 and W4A8; the cells of its tables are not known to us, so
there is no figure of its own to meet. What others published (PSNR and SSIM against 16-bit images):

    source                                 format           PSNR    SSIM    FID
    SVDQuant, its own table                INT W4A4         17.0            19.9     5000 MJHQ prompts; FP16: FID 16.6
    SVDQuant + GPTQ                        INT W4A4         17.6            19.2
    round to nearest                       NVFP4            14.8            31.8
    SVDQuant                               NVFP4            18.0            17.3
    SVDQuant + GPTQ                        NVFP4            18.5            16.6
    SVDQuant, other harness (2500 MJHQ)    MXFP4 W4A4       15.24   0.566
    SVDQuant, that harness                 NVFP4            17.88   0.673
    SVDQuant rank 32, H-SVDQuant's table   INT W4A4         16.27

Sources: the tables of SVDQuant's code (deepcompressor) for the first five; the study absorb_basis
in a fork of DiRotQ; the paper of H-SVDQuant. SVDQuant's rows use 128 calibration prompts and
smoothing; the `svdquant` of this package is data-free and without smoothing, so it can be worse.
The same configuration differs by 1 dB between harnesses: compare inside one run only. FID needs
weights of Inception, which this script does not load: run your FID on the image folders.
"""

from paper_study import Study, main
from tiny_pipelines import tiny_pixart_sigma

STUDY = Study(
    name="pixart-sigma",
    hub_id="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    call={"num_inference_steps": 20, "guidance_scale": 4.5, "clean_caption": False},
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
