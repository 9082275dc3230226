"""The system calls that a sandboxed program may not make, as a classic BPF filter.

Namespaces take away the file system, the network and other processes. What is left to refuse is
memory that no limit of the sandbox counts (memfd, System V and POSIX queues, io_uring), further
namespaces, and corners of the kernel that answers to puzzles do not need.
"""

from __future__ import annotations

import errno
import functools
import platform
import struct

# System call numbers: x86-64, AArch64. From Linux' tables, as of version 6.12.
_DENIED = {
    "add_key": (248, 217),
    "bpf": (321, 280),
    "delete_module": (176, 106),
    "finit_module": (313, 273),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "init_module": (175, 105),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "mq_open": (240, 180),
    "msgget": (68, 186),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "request_key": (249, 218),
    "semget": (64, 190),
    "setns": (308, 268),
    "shmget": (29, 194),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
    "vmsplice": (278, 75),
}
_CLONE = (56, 220)
_CLONE3 = (435, 435)
_CLONE_NEWUSER = 0x10000000
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Calls of the x32 ABI, which would go round the numbers above.
_X32 = 0x40000000

# Codes of classic BPF and of seccomp's verdicts; offsets into struct seccomp_data.
_LOAD, _JUMP_EQ, _JUMP_GE, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16


@functools.cache
def bpf_filter() -> bytes:
    """The filter for this machine, as `bwrap --seccomp` reads it.

    Raises:
      OSError: a machine whose system calls are not listed here.
    """
    machine = platform.machine()
    if machine not in _AUDIT_ARCH:
        raise OSError(f"no system call filter for {machine}; there is for {', '.join(_AUDIT_ARCH)}")
    column = list(_AUDIT_ARCH).index(machine)
    code = [
        (_LOAD, 0, 0, _ARCH),
        (_JUMP_EQ, 1, 0, _AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_JUMP_GE, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL),
    ]
    for numbers in _DENIED.values():
        code += _refuse(numbers[column], errno.EPERM)
    # clone3 keeps its flags in memory, out of a filter's sight; libraries then fall back to clone.
    code += _refuse(_CLONE3[column], errno.ENOSYS)
    code += [
        (_JUMP_EQ, 0, 3, _CLONE[column]),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_JUMP_SET, 0, 1, _CLONE_NEWUSER),
        (_RETURN, 0, 0, _ERROR | errno.EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _refuse(number: int, error: int) -> list[tuple[int, int, int, int]]:
    return [(_JUMP_EQ, 0, 1, number), (_RETURN, 0, 0, _ERROR | error)]
