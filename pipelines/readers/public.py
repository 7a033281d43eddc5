"""Which addresses of the network belong to the public internet, and may be asked for an image.

Python's ``is_global`` follows IANA's registries as they were when that Python was made, and knows
neither the ways to write an IPv4 address as an IPv6 one nor what clouds keep for themselves.
"""

from __future__ import annotations

from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)

_NOT_PUBLIC_4 = tuple(
    map(
        IPv4Network,
        (
            "0.0.0.0/8",
            "10.0.0.0/8",
            "100.64.0.0/10",  # shared by providers; Alibaba's metadata are at 100.100.100.200
            "127.0.0.0/8",
            "168.63.129.16/32",  # Azure's services for its own machines
            "169.254.0.0/16",  # link-local, and the metadata of most clouds
            "172.16.0.0/12",
            "192.0.0.0/24",  # protocol assignments; Oracle's metadata are at 192.0.0.192
            "192.0.2.0/24",
            "192.88.99.0/24",  # relays of 6to4
            "192.168.0.0/16",
            "198.18.0.0/15",
            "198.51.100.0/24",
            "203.0.113.0/24",
            "224.0.0.0/4",
            "240.0.0.0/4",
        ),
    )
)

_PUBLIC_6 = IPv6Network("2000::/3")
"""All that was ever given out as global unicast. The rest is local, reserved or an IPv4 address:
fc00::/7 with the metadata of AWS at fd00:ec2::254, fe80::/10, fec0::/10, ff00::/8, ::/96 …"""

_NOT_PUBLIC_6 = tuple(
    map(
        IPv6Network,
        (
            "2001:2::/48",  # benchmarks
            "2001:3::/32",  # relays of multicast
            "2001:10::/28",  # ORCHID, names and no places
            "2001:20::/28",
            "2001:db8::/32",
            "3fff::/20",
        ),
    )
)

_WITH_IPV4 = tuple(map(ip_network, ("::ffff:0:0/96", "64:ff9b::/96")))
"""Networks whose last 32 bits are the IPv4 address that is meant: mapped, and NAT64. Translated
ones (``::ffff:0:0:0/96``) and those of a local NAT64 (``64:ff9b:1::/48``) lead who knows where."""


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, also when it is wrapped in an IPv6.

    One with a scope (``fe80::1%eth0``) never is.
    """
    if "%" in address:
        return False
    found = ip_address(address)
    return _is_public_4(found) if isinstance(found, IPv4Address) else _is_public_6(found)


def _is_public_4(found: IPv4Address) -> bool:
    return found.is_global and not any(found in network for network in _NOT_PUBLIC_4)


def _is_public_6(found: IPv6Address) -> bool:
    if any(found in network for network in _WITH_IPV4):
        return _is_public_4(IPv4Address(int(found) & 0xFFFFFFFF))
    if found not in _PUBLIC_6 or any(found in network for network in _NOT_PUBLIC_6):
        return False
    if found.sixtofour is not None:
        return _is_public_4(found.sixtofour)
    if found.teredo is not None:
        return all(map(_is_public_4, found.teredo))
    return found.is_global
