"""An IPv4 address of this machine: `of INTERFACE`, or the one it would send from `towards HOST`.

Asks the kernel alone: nothing is sent. Prints nothing where there is no such address.
"""

import fcntl
import socket
import struct
import sys

SIOCGIFADDR = 0x8915

what, name = sys.argv[1:]
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    try:
        if what == "of":
            request = struct.pack("256s", name.encode()[:15])
            print(socket.inet_ntoa(fcntl.ioctl(probe, SIOCGIFADDR, request)[20:24]))
        else:
            probe.connect((name, 9))
            print(probe.getsockname()[0])
    except OSError:
        pass
