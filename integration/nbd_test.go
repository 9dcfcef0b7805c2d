package integration

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// mains is what disks get their power from: it goes for any of them at one
// instant, between two requests or in the midst of one.
type mains struct {
	random *rand.Rand
	// grain is what a torn write is torn at, in bytes: a multiple of 512.
	grain int64

	mu sync.Mutex
	// watch, if set, sees every write and flush, a write when it is in the
	// disk's cache and not answered yet, a flush before it. It answers which
	// disks lose their power now.
	watch func(d *volatileDisk, r diskRequest) []*volatileDisk
}

// diskRequest is a write, or a flush.
type diskRequest struct {
	flush  bool
	offset int64
	data   []byte
}

func newMains(seed uint64) *mains {
	return &mains{random: rand.New(rand.NewPCG(seed, 0)), grain: sector}
}

// volatileDisk is a disk whose cache loses what was not flushed. The guest's
// kernel reaches it as an NBD device; the server is this process.
//
//	write -> pending -> Flush -> durable
//	                 -> power cut: each sector of each pending write is kept or lost
//
// It announces no FUA, so the kernel turns a FUA write into a write and a flush.
type volatileDisk struct {
	path  string
	size  int64
	mains *mains // its lock guards all that follows

	durable diskPages
	// pending are the writes since the last flush, in order; view is what a
	// reader sees: durable with all of them applied.
	pending []pendingWrite
	view    diskPages
	dead    bool
	// before and atRisk are what was durable, and what was not, at the last cut.
	before diskPages
	atRisk []pendingWrite

	device *os.File
	server *os.File
	done   chan error
	served chan struct{}
}

type pendingWrite struct {
	offset int64
	data   []byte
}

// diskPages is a disk's content in pages of 4 KiB, by number; what is not
// there is zeros. A page never changes, so copies share them: a guest's
// process can't have more than some 200 MiB, for want of mappings.
type diskPages map[int64][]byte

const diskPage = 4096

func (c diskPages) read(into []byte, offset int64) {
	for len(into) > 0 {
		n, at := offset/diskPage, offset%diskPage
		some := min(int64(len(into)), diskPage-at)
		if page := c[n]; page != nil {
			copy(into[:some], page[at:])
		} else {
			clear(into[:some])
		}
		into, offset = into[some:], offset+some
	}
}

// write keeps data, which must not change any more.
func (c diskPages) write(data []byte, offset int64) {
	for len(data) > 0 {
		n, at := offset/diskPage, offset%diskPage
		some := min(int64(len(data)), diskPage-at)
		page := data[:some:some]
		if some < diskPage {
			page = make([]byte, diskPage)
			copy(page, c[n])
			copy(page[at:], data[:some])
		}
		if allZero(page) {
			delete(c, n)
		} else {
			c[n] = page
		}
		data, offset = data[some:], offset+some
	}
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

// disk makes disk number i (0 to 15) of the given size in bytes, a multiple of
// 512, and connects it as /dev/nbdI. The guest needs module nbd.
func (m *mains) disk(t *testing.T, i int, size int64) *volatileDisk {
	t.Helper()
	d := &volatileDisk{
		path: fmt.Sprintf("/dev/nbd%d", i), size: size, mains: m,
		durable: diskPages{}, view: diskPages{},
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
	go func() {
		// A signal, that of a child's end for one, would end the connection.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		var all, before unix.Sigset_t
		for i := range all.Val {
			all.Val[i] = ^all.Val[i]
		}
		err := unix.PthreadSigmask(unix.SIG_SETMASK, &all, &before)
		if err == nil {
			err = unix.IoctlSetInt(int(d.device.Fd()), nbdDoIt, 0)
		}
		d.done <- errors.Join(err, unix.PthreadSigmask(unix.SIG_SETMASK, &before, nil))
	}()
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

// cut takes the power away: the disks answer everything with an error from now
// on, and it is decided what survives.
func (m *mains) cut(disks ...*volatileDisk) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.cutLocked(disks)
}

// arm sets watch.
func (m *mains) arm(watch func(*volatileDisk, diskRequest) []*volatileDisk) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.watch = watch
}

func (m *mains) cutLocked(disks []*volatileDisk) {
	for _, d := range disks {
		if d.dead {
			continue
		}
		d.dead, d.before, d.atRisk, d.pending = true, maps.Clone(d.durable), d.pending, nil
		d.durable = m.afterCut(d.before, d.atRisk, m.random.IntN(3) == 0)
	}
}

// afterCut decides for each write since the last flush, by chance, whether it
// is kept, lost or torn at sectors. A cut that loses all but one of many
// writes, or none but one, finds other faults than an even mix: the chances
// are drawn too, and with newest that write is kept and no other.
func (m *mains) afterCut(durable diskPages, atRisk []pendingWrite, newest bool) diskPages {
	after := maps.Clone(durable)
	keep, tear := m.random.Float64()*1.5-0.25, m.random.Float64()*1.5-0.25
	if newest {
		atRisk, keep = atRisk[max(0, len(atRisk)-1):], 1
	}
	for _, w := range atRisk {
		kept := m.random.Float64() < keep
		torn := !kept && m.random.Float64() < tear
		for at := int64(0); at < int64(len(w.data)); at += m.grain {
			if kept || torn && m.random.IntN(2) == 0 {
				after.write(w.data[at:min(at+m.grain, int64(len(w.data)))], w.offset+at)
			}
		}
	}
	return after
}

// powerOn connects the disk again with what survived. All users of the old
// connection must have let go of it.
func (d *volatileDisk) powerOn(t *testing.T) {
	t.Helper()
	d.disconnect()
	d.mains.mu.Lock()
	d.dead, d.before, d.atRisk = false, nil, nil
	d.view = maps.Clone(d.durable)
	d.mains.mu.Unlock()
	d.connect(t)
}

// wipe makes it a new disk.
func (d *volatileDisk) wipe(t *testing.T) {
	t.Helper()
	d.mains.cut(d)
	d.durable = diskPages{}
	d.powerOn(t)
}

// pendingBytes is what a power cut now would put at risk.
func (d *volatileDisk) pendingBytes() int64 {
	d.mains.mu.Lock()
	defer d.mains.mu.Unlock()
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
	m := d.mains
	m.mu.Lock()
	defer m.mu.Unlock()
	if d.dead || offset+length > d.size {
		return unix.EIO
	}
	if kind == nbdCmdWrite {
		d.view.write(data, offset)
		d.pending = append(d.pending, pendingWrite{offset, data})
	}
	if kind == nbdCmdWrite || kind == nbdCmdFlush {
		r := diskRequest{kind == nbdCmdFlush, offset, data}
		if m.watch != nil {
			m.cutLocked(m.watch(d, r))
		}
	}
	if d.dead {
		return unix.EIO
	}
	switch kind {
	case nbdCmdRead:
		d.view.read(data, offset)
	case nbdCmdWrite:
	case nbdCmdTrim:
		// Allowed to do nothing: what a discarded range reads as is undefined.
	case nbdCmdFlush:
		for _, w := range d.pending {
			d.durable.write(w.data, w.offset)
		}
		d.pending = nil
	default:
		return unix.EINVAL
	}
	return 0
}

// A disk that loses nothing proves nothing: this one must lose exactly what
// was not flushed, now this and now that, on all disks at one instant.
func TestHarnessVolatileDisk(t *testing.T) {
	inGuest(t, guest{Modules: []string{"nbd"}}, func(t *testing.T) {
		m := newMains(1)
		d, other := m.disk(t, 0, 32<<20), m.disk(t, 1, 4<<20)
		write := func(d *volatileDisk, at int64, fill byte, flush bool) error {
			f, err := os.OpenFile(d.path, os.O_RDWR|unix.O_DIRECT, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			page := alignedBuffer(4096)
			defer unix.Munmap(page)
			for i := range page {
				page[i] = fill
			}
			if _, err := f.WriteAt(page, at); err != nil || !flush {
				return err
			}
			return f.Sync()
		}
		must := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		kept, lost, cuts := 0, 0, byte(8)
		for round := range cuts {
			must(write(d, 0, round+1, true))
			for i := int64(1); i <= 64; i++ {
				must(write(d, i*4096, round+1, false))
			}
			if d.pendingBytes() != 64*4096 {
				t.Fatalf("%d bytes are pending", d.pendingBytes())
			}
			// In the midst of a write to one, power goes for both.
			m.arm(func(*volatileDisk, diskRequest) []*volatileDisk { return []*volatileDisk{d, other} })
			if err := write(d, 65*4096, round+1, false); err == nil {
				t.Fatal("a write during which the power went succeeded")
			}
			if err := write(other, 0, 1, false); err == nil {
				t.Fatal("the other disk has power still")
			}
			m.arm(nil)
			d.powerOn(t)
			other.powerOn(t)
			must(readDirect(d.path, func(offset int64, piece []byte) error {
				for at := 0; at < len(piece); at += sector {
					switch where := (offset + int64(at)) / 4096; {
					case where == 0 && piece[at] != round+1:
						return fmt.Errorf("a flushed sector is lost")
					case where >= 1 && where <= 64 && piece[at] == round+1:
						kept++
					case where >= 1 && where <= 64:
						lost++
					}
				}
				return nil
			}))
		}
		if all := 64 * 8 * int(cuts); kept < all/10 || lost < all/10 {
			t.Fatalf("%d sectors kept, %d lost: both were to be expected", kept, lost)
		}
		t.Logf("%d sectors kept, %d lost", kept, lost)
	})
}
