// Package attach makes a volume of a device that is already mounted and in use:
// no mapper below it, no remount, nothing written to it. It keeps its state in
// a file elsewhere.
//
// What changes is tracked by programs in the kernel (blockdev/bpf). A cut is read
// into memory (blockdev/precopy); writers are stopped for its last reads by
// freezing every file system on the device, which the dead-man thaws
// (blockdev/deadman).
//
// A freeze stops whoever writes by way of the file system, nobody else. So a
// device is refused unless every user of it is a file system that can be frozen,
// and a cut is void if anything was written, or was in flight, between freeze
// and thaw: by the device's own statistics, and by the tracker's marks. A device
// that is not mounted has nothing to freeze: its cut is valid only if nothing was
// written while it was read.
package attach
