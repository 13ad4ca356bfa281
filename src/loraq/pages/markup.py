"""HTML by construction: a string that is not markup already is escaped, wherever it comes from."""

from html import escape

from loraq.errors import show


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


#: What may stand in an element.
Content = str | int | None


def tag(element: str, /, *content: Content, **attributes: str | float | None) -> Markup:
    """Return an element.

    Names of layers come from strangers' files: strings are escaped, and what would move the cursor
    or turn the direction of text is shown as error messages show it.

    Args:
        element: its name.
        content: what stands in it; `None` is left out.
        attributes: of the element; `_` stands for `-`, one at the end is dropped, and `None` is
            left out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(show(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    end = "" if element in ("img", "meta") else f"{join(*content)}</{element}>"
    return Markup(f"<{element}{written}>{end}")


def join(*content: Content) -> Markup:
    """Return what stands beside each other, escaped where it is no markup."""
    parts = (each for each in content if each is not None)
    return Markup(
        "".join(each if isinstance(each, Markup) else escape(show(each)) for each in parts)
    )
