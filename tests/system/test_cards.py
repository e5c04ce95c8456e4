"""Cards by the names that users and drivers give them."""

import pytest

from p828.errors import ConfigError
from p828.system.cards import CARDS, card, card_of_device

DRIVERS = {
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA GH200 480GB": "gh200",
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100 80GB PCIe": "a100-pcie",
    "NVIDIA A100-PCIE-40GB": "a100-pcie-40gb",
    "NVIDIA H100 NVL": "h100-nvl",
    "NVIDIA GeForce RTX 4090": "4090",
    "NVIDIA H200": "h200",
}


@pytest.mark.parametrize("device_name, name", DRIVERS.items())
def test_a_driver_s_name(device_name: str, name: str) -> None:
    found = card_of_device(device_name)
    assert found is not None
    assert found.name == name


def test_every_card_is_found_by_its_own_names() -> None:
    for one in CARDS:
        assert card(one.name) == card(one.name.upper()) == card_of_device(f"NVIDIA {one.device_name}") == one
    assert card("RTX 5090").name == "5090"
    assert card_of_device("a card of tomorrow") is None


@pytest.mark.parametrize(
    "device_name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA H200 NVL",
        "NVIDIA GB200",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    ],
)
def test_a_card_of_a_like_name_is_another(device_name: str) -> None:
    assert card_of_device(device_name) is None


def test_an_unknown_card_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"--gpu h10; did you mean h100\? Accepted: gh200, b200, "):
        card("h10")
