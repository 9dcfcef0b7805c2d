// Package udev hears from the kernel which block devices come, go and change, and finds
// one by its serial number or model. udevd need not run.
package udev

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// maxMessage is the size of the kernel's buffer for a message, in bytes, with room for
// what stands before it.
const maxMessage = 8 << 10

// Event is what the kernel says of one object. A message is
//
//	ACTION@DEVPATH \0 KEY=VALUE \0 KEY=VALUE \0 …
//
// where ACTION, DEVPATH, SUBSYSTEM and SEQNUM are among the keys, in any order. A value may
// hold '=' and may be empty.
type Event struct {
	// Action is add, remove, change, move, online, offline, bind or unbind, or what
	// later kernels say.
	Action string
	// Path is the object's folder in sysfs, without the mount point: it begins with '/'.
	Path      string
	Subsystem string
	// Number counts the events of this boot.
	Number uint64
	// Of a block device: its node below /dev, its number, and which of all disks that
	// this boot has seen it is (0: the kernel does not say).
	Name         string
	Major, Minor uint32
	Sequence     uint64
	// Resized says that it has another size now.
	Resized bool
}

// Block reports whether the event is of a block device, a disk or a partition.
func (e Event) Block() bool { return e.Subsystem == "block" }

// errMessage says that a message is not one of the kernel's.
var errMessage = errors.New("no kernel event")

// Parse reads a message. It keeps nothing of it.
func Parse(message []byte) (Event, error) {
	fail := func(format string, args ...any) (Event, error) {
		return Event{}, fmt.Errorf("%w: %s", errMessage, fmt.Sprintf(format, args...))
	}
	if len(message) == 0 || len(message) > maxMessage {
		return fail("%d bytes, want 1 to %d", len(message), maxMessage)
	}
	if message[len(message)-1] != 0 {
		return fail("its end is cut off")
	}
	head, rest, _ := bytes.Cut(message, []byte{0})
	action, path, ok := strings.Cut(string(head), "@")
	if !ok || action == "" || !strings.HasPrefix(path, "/") {
		return fail("it begins with %.100q, want ACTION@DEVPATH", head)
	}
	values := map[string]string{}
	for len(rest) > 0 {
		var pair []byte
		pair, rest, _ = bytes.Cut(rest, []byte{0})
		key, value, ok := strings.Cut(string(pair), "=")
		if !ok || key == "" {
			return fail("%.100q, want KEY=VALUE", pair)
		}
		if _, twice := values[key]; twice {
			return fail("two values of %s", key)
		}
		values[key] = value
	}
	e := Event{Action: action, Path: path, Subsystem: values["SUBSYSTEM"], Name: values["DEVNAME"], Resized: values["RESIZE"] == "1"}
	if values["ACTION"] != action || values["DEVPATH"] != path {
		return fail("%.100q is about ACTION %.100q, DEVPATH %.100q", head, values["ACTION"], values["DEVPATH"])
	}
	if e.Subsystem == "" {
		return fail("it names no SUBSYSTEM")
	}
	for _, number := range []struct {
		key  string
		bits int
		into func(uint64)
		must bool
	}{
		{"SEQNUM", 64, func(n uint64) { e.Number = n }, true},
		{"MAJOR", 32, func(n uint64) { e.Major = uint32(n) }, e.Block()},
		{"MINOR", 32, func(n uint64) { e.Minor = uint32(n) }, e.Block()},
		{"DISKSEQ", 64, func(n uint64) { e.Sequence = n }, false},
	} {
		text, there := values[number.key]
		if !there && !number.must {
			continue
		}
		n, err := strconv.ParseUint(text, 10, number.bits)
		if err != nil {
			return fail("%s is %.100q, want a number", number.key, text)
		}
		number.into(n)
	}
	if e.Block() && e.Name == "" {
		return fail("block device %d:%d has no DEVNAME", e.Major, e.Minor)
	}
	return e, nil
}
