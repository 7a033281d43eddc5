"""Which addresses of the network belong to the public internet, and may be asked for an image.

Python's ``is_global`` follows IANA's registries as they were when that Python was made, and knows
neither the ways to write an IPv4 address as an IPv6 one nor what clouds keep for themselves.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

# What ``is_global`` takes for public in some version of Python from 3.11 on.
_NOT_PUBLIC_4 = (
    IPv4Network("168.63.129.16/32"),  # Azure's services for its own machines
    IPv4Network("192.0.0.0/24"),  # protocol assignments; Oracle's metadata are at 192.0.0.192
    IPv4Network("192.88.99.0/24"),  # relays of 6to4
    IPv4Network("224.0.0.0/4"),  # multicast
)

_PUBLIC_6 = IPv6Network("2000::/3")
"""All that was ever given out as global unicast. The rest is local, reserved or an IPv4 address:
fc00::/7 with the metadata of AWS at fd00:ec2::254, fe80::/10, fec0::/10, ff00::/8, ::/96 …"""

_NOT_PUBLIC_6 = (
    IPv6Network("2001:2::/48"),  # benchmarks
    IPv6Network("2001:3::/32"),  # relays of multicast
    IPv6Network("2001:10::/28"),  # ORCHID, names and no places
    IPv6Network("2001:20::/28"),
    IPv6Network("2001:db8::/32"),
    IPv6Network("3fff::/20"),
)

_WITH_IPV4 = (IPv6Network("::ffff:0:0/96"), IPv6Network("64:ff9b::/96"))
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
