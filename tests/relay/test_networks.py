"""Which network an address is in."""

import pytest

from mailsluice_relay.config import ConfigurationError
from mailsluice_relay.policy.networks import Networks, source_network


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.77", "192.0.2.0/24"),
        ("::ffff:192.0.2.77", "192.0.2.0/24"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
    ],
)
def test_source_network(address: str, network: str) -> None:
    assert source_network(address) == network


def test_membership() -> None:
    networks = Networks(["10.0.0.0/8", "2001:db8::/32", "192.0.2.1"], "authentication.allowedNetworks")
    for inside in ("10.255.0.1", "::ffff:10.0.0.1", "2001:db8::1", "192.0.2.1"):
        assert inside in networks
    for outside in ("11.0.0.1", "2001:db9::1", "192.0.2.2", "::a00:1"):
        assert outside not in networks
    assert "10.0.0.1" not in Networks([], "x")


@pytest.mark.parametrize("network", ["10.0.0.1/8", "ten/8", "", "10.0.0.0/33"])
def test_what_is_no_network_is_an_error_that_names_the_field(network: str) -> None:
    with pytest.raises(ConfigurationError, match=r"authentication\.allowedNetworks"):
        Networks([network], "authentication.allowedNetworks")
