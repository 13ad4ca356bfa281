r"""SANA-1.6B, the second of the paper's models: is LoRaQ better than SVDQuant at equal bytes?

    python experiments/sana.py --source Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers \
        --prompts meta_data.json --images 1024 --workers 8
    python experiments/sana.py --local-tiny                  # random weights, a minute on a CPU: does it all run?

As `pixart_sigma.py`, which explains the rows and the protocol. Published setting: 20 steps of the
flow DPM solver, guidance 4.5, bf16.

Expected. LoRaQ (arXiv 2604.18117) reports better scores than SVDQuant at equal memory overhead on
this model too; the cells of its tables are not known to us. What others published differs by 3 dB
for the same configuration between harnesses: compare inside one run only.
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
