r"""SANA-1.6B, the second of the paper's models: is LoRaQ better than SVDQuant at equal bytes?

    python experiments/sana.py --source Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers \
        --prompts meta_data.json --images 1024 --workers 8
    python experiments/sana.py --local-tiny                  # random weights, a minute on a CPU: does it all run?

As `pixart_sigma.py`, which explains the rows and the sources. Published setting: 20 steps of the
flow DPM solver, guidance 4.5, bf16.

Expected. LoRaQ (arXiv 2604.18117) reports better scores than SVDQuant at equal memory overhead on
this model too; the cells of its tables are not known to us. What others published (PSNR against
16-bit images):

    source                                 format           PSNR    FID
    round to nearest, SVDQuant's table     INT W4A4         15.3    20.5     5000 MJHQ prompts; BF16: FID 20.6
    SVDQuant                               INT W4A4         17.4    19.9
    SVDQuant + GPTQ                        INT W4A4         17.8    19.3
    round to nearest                       NVFP4            17.4    19.7
    SVDQuant                               NVFP4            18.6    20.2
    SVDQuant + GPTQ                        NVFP4            19.0    20.2
    SVDQuant rank 32, H-SVDQuant's table   INT W4A4         20.24

Sources: the tables of SVDQuant's code (deepcompressor), the paper of H-SVDQuant. The two differ by
3 dB for the same configuration: compare inside one run only.
"""

from paper_study import Study, main
from tiny_pipelines import tiny_sana

STUDY = Study(
    name="sana",
    hub_id="Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
    call={"num_inference_steps": 20, "guidance_scale": 4.5},
    tiny=tiny_sana,
    tiny_call={
        "num_inference_steps": 4,
        "height": 32,
        "width": 32,
        "use_resolution_binning": False,
        "max_sequence_length": 32,
        "complex_human_instruction": None,
    },
)

if __name__ == "__main__":
    main(STUDY)
