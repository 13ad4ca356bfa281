"""Numbers as people read them."""

from loraq.figures import number, size_of


def test_figures_for_people():
    assert [size_of(n) for n in (0, 1536, 3 * 2**20, 5 * 2**30)] == [
        "0.0 KiB",
        "1.5 KiB",
        "3.0 MiB",
        "5.00 GiB",
    ]
    assert [number(x) for x in (0.04393, None, 1e300, float("nan"))] == [
        "0.0439",
        "–",
        "1e+300",
        "nan",
    ]
