// Package dm speaks to the kernel's device-mapper by ioctl. It knows tables
// as plain values and keeps no state beyond one open file.
//
// One process at a time should own a device: a message or a status request
// to a suspended era device blocks until somebody resumes it.
package dm
