package integration

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// volatileDisk is a disk whose cache loses what was not flushed. The guest's
// kernel reaches it as an NBD device; the server is this process.
//
//	write -> pending -> Flush -> durable
//	                 -> powerCut: each sector of each pending write is kept or lost
//
// It announces no FUA, so the kernel turns a FUA write into a write and a flush.
type volatileDisk struct {
	path string
	size int64

	mu      sync.Mutex
	durable []byte
	// pending are the writes since the last flush, in order; view is what a
	// reader sees: durable with all of them applied.
	pending []pendingWrite
	view    []byte
	dead    bool
	// ignoreFlush makes the disk lie: it answers flushes and keeps nothing.
	ignoreFlush bool
	flushes     int
	// onRequest, if set, is called with every write (false) and flush
	// (true) before it is carried out; when it answers true, power is cut there
	// with the chances of cutRand.
	onRequest func(flush bool) (cut bool)
	cutRand   *rand.Rand

	device *os.File
	server *os.File
	done   chan error
	served chan struct{}
}

type pendingWrite struct {
	offset int64
	data   []byte
}

const (
	nbdRequestMagic = 0x25609513
	nbdReplyMagic   = 0x67446698

	nbdCmdRead  = 0
	nbdCmdWrite = 1
	nbdCmdDisc  = 2
	nbdCmdFlush = 3
	nbdCmdTrim  = 4

	nbdFlagHasFlags  = 1 << 0
	nbdFlagSendFlush = 1 << 2
	nbdFlagSendTrim  = 1 << 5

	nbdSetSock      = 0xab00
	nbdSetBlockSize = 0xab01
	nbdDoIt         = 0xab03
	nbdClearSock    = 0xab04
	nbdSetSizeBlock = 0xab07
	nbdDisconnect   = 0xab08
	nbdSetTimeout   = 0xab09
	nbdSetFlags     = 0xab0a
)

// newVolatileDisk makes disk number i (0 to 15) of the given size in bytes, a
// multiple of 512, and connects it as /dev/nbdI. The guest needs module nbd.
func newVolatileDisk(t *testing.T, i int, size int64) *volatileDisk {
	t.Helper()
	d := &volatileDisk{
		path: fmt.Sprintf("/dev/nbd%d", i), size: size,
		durable: make([]byte, size), view: make([]byte, size),
	}
	d.connect(t)
	t.Cleanup(func() { d.disconnect() })
	return d
}

func (d *volatileDisk) connect(t *testing.T) {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	d.server = os.NewFile(uintptr(pair[0]), "nbd server")
	if d.device, err = os.OpenFile(d.path, os.O_RDWR, 0); err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		name    string
		request uint
		value   int
	}{
		{"block size", nbdSetBlockSize, sector},
		{"size", nbdSetSizeBlock, int(d.size / sector)},
		{"flags", nbdSetFlags, nbdFlagHasFlags | nbdFlagSendFlush | nbdFlagSendTrim},
		{"timeout", nbdSetTimeout, 0},
		{"socket", nbdSetSock, pair[1]},
	} {
		if err := unix.IoctlSetInt(int(d.device.Fd()), step.request, step.value); err != nil {
			t.Fatalf("%s: set %s: %v", d.path, step.name, err)
		}
	}
	unix.Close(pair[1]) // the kernel holds it now
	d.done, d.served = make(chan error, 1), make(chan struct{})
	go func() { d.done <- unix.IoctlSetInt(int(d.device.Fd()), nbdDoIt, 0) }()
	go func() {
		defer close(d.served)
		if err := d.serve(); err != nil && !errors.Is(err, io.EOF) {
			fmt.Printf("%s: server: %v\n", d.path, err)
		}
	}()
	// The size appears with NBD_DO_IT.
	for deadline := time.Now().Add(5 * time.Second); sectors(t, d.path) != d.size/sector; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s has %d sectors, should have %d", d.path, sectors(t, d.path), d.size/sector)
		}
	}
}

// disconnect takes the device away; users of it get errors from then on.
func (d *volatileDisk) disconnect() {
	if d.device == nil {
		return
	}
	unix.IoctlSetInt(int(d.device.Fd()), nbdDisconnect, 0)
	<-d.served // it has seen the request to disconnect
	d.server.Close()
	<-d.done
	unix.IoctlSetInt(int(d.device.Fd()), nbdClearSock, 0)
	d.device.Close()
	d.device = nil
}

// powerCut makes the disk answer everything with an error from now on and
// decides what survives: of each write since the last flush every sector is,
// by chance, kept or lost, unless the whole write is kept or lost.
func (d *volatileDisk) powerCut(random *rand.Rand) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.cutLocked(random)
}

func (d *volatileDisk) cutLocked(random *rand.Rand) {
	if d.dead {
		return
	}
	d.dead = true
	for _, w := range d.pending {
		fate := random.IntN(3) // 0 lost, 1 kept, 2 torn
		for at := int64(0); at < int64(len(w.data)); at += sector {
			if fate == 1 || fate == 2 && random.IntN(2) == 0 {
				copy(d.durable[w.offset+at:w.offset+at+sector], w.data[at:])
			}
		}
	}
	d.pending = nil
}

// powerOn connects the disk again with what survived. All users of the old
// connection must have let go of it.
func (d *volatileDisk) powerOn(t *testing.T) {
	t.Helper()
	d.disconnect()
	d.mu.Lock()
	d.dead, d.onRequest = false, nil
	copy(d.view, d.durable)
	d.mu.Unlock()
	d.connect(t)
}

// pendingBytes is what a power cut now would put at risk.
func (d *volatileDisk) pendingBytes() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	var n int64
	for _, w := range d.pending {
		n += int64(len(w.data))
	}
	return n
}

// serve answers the kernel's requests, one at a time. Layout of a request,
// big-endian: magic u32, flags u16, type u16, handle u64, offset u64, length
// u32; of a reply: magic u32, error u32, handle u64. (Linux, include/uapi/linux/nbd.h)
func (d *volatileDisk) serve() error {
	var request [28]byte
	var reply [16]byte
	for {
		if _, err := io.ReadFull(d.server, request[:]); err != nil {
			return err
		}
		if magic := binary.BigEndian.Uint32(request[0:]); magic != nbdRequestMagic {
			return fmt.Errorf("request with magic %#x", magic)
		}
		kind := binary.BigEndian.Uint16(request[6:])
		offset := int64(binary.BigEndian.Uint64(request[16:]))
		length := int64(binary.BigEndian.Uint32(request[24:]))
		var data []byte
		if kind == nbdCmdWrite || kind == nbdCmdRead {
			data = make([]byte, length)
		}
		if kind == nbdCmdWrite {
			if _, err := io.ReadFull(d.server, data); err != nil {
				return err
			}
		}
		if kind == nbdCmdDisc {
			return nil
		}
		errno := d.carryOut(kind, offset, length, data)
		binary.BigEndian.PutUint32(reply[0:], nbdReplyMagic)
		binary.BigEndian.PutUint32(reply[4:], uint32(errno))
		copy(reply[8:], request[8:16])
		answer := reply[:]
		if kind == nbdCmdRead && errno == 0 {
			answer = append(answer[:len(answer):len(answer)], data...)
		}
		if _, err := d.server.Write(answer); err != nil {
			return err
		}
	}
}

func (d *volatileDisk) carryOut(kind uint16, offset, length int64, data []byte) unix.Errno {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.onRequest != nil && !d.dead && (kind == nbdCmdWrite || kind == nbdCmdFlush) && d.onRequest(kind == nbdCmdFlush) {
		d.cutLocked(d.cutRand)
	}
	if d.dead || offset+length > d.size {
		return unix.EIO
	}
	switch kind {
	case nbdCmdRead:
		copy(data, d.view[offset:])
	case nbdCmdWrite:
		copy(d.view[offset:], data)
		d.pending = append(d.pending, pendingWrite{offset, data})
	case nbdCmdTrim:
		// Allowed to do nothing: what a discarded range reads as is undefined.
	case nbdCmdFlush:
		d.flushes++
		if d.ignoreFlush {
			return 0
		}
		for _, w := range d.pending {
			copy(d.durable[w.offset:], w.data)
		}
		d.pending = nil
	default:
		return unix.EINVAL
	}
	return 0
}

// A disk that loses nothing proves nothing: this one must lose exactly what was not flushed.
func TestHarnessVolatileDisk(t *testing.T) {
	inGuest(t, guest{Modules: []string{"nbd"}}, func(t *testing.T) {
		d := newVolatileDisk(t, 0, 32<<20)
		write := func(at int64, fill byte, flush bool) {
			f, err := os.OpenFile(d.path, os.O_RDWR|unix.O_DIRECT, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			page := alignedBuffer(4096)
			for i := range page {
				page[i] = fill
			}
			if _, err := f.WriteAt(page, at); err != nil {
				t.Fatal(err)
			}
			if flush {
				if err := f.Sync(); err != nil {
					t.Fatal(err)
				}
			}
		}
		write(0, 1, true)
		for i := int64(1); i <= 64; i++ {
			write(i*4096, 2, false)
		}
		if d.pendingBytes() != 64*4096 {
			t.Fatalf("%d bytes are pending", d.pendingBytes())
		}
		d.powerCut(rand.New(rand.NewPCG(1, 1)))
		d.powerOn(t)
		kept, lost := 0, 0
		err := readDirect(d.path, func(offset int64, piece []byte) error {
			for at := 0; at < len(piece); at += sector {
				switch where := (offset + int64(at)) / 4096; {
				case where == 0 && piece[at] != 1:
					return fmt.Errorf("a flushed sector is lost")
				case where >= 1 && where <= 64 && piece[at] == 2:
					kept++
				case where >= 1 && where <= 64:
					lost++
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if kept < 50 || lost < 50 {
			t.Fatalf("%d sectors kept, %d lost: both were to be expected", kept, lost)
		}
		t.Logf("%d sectors kept, %d lost", kept, lost)
	})
}
