package integration

import (
	"errors"
	"os"
	"sync/atomic"
	"testing"
	"time"
)

// smbModules are those of the kernel's SMB client, and what it finds by name in the kernel.
var smbModules = []string{"cifs", "cmac", "hmac", "sha512_generic", "ecb", "ctr", "ccm", "gcm", "ghash-generic", "nls_utf8"}

// The manual's walk to a highly available Samba server: its commands, in guests. The kernel's SMB
// client goes on without a new mount when the volume is moved, with nothing lost, and when the
// primary's machine loses its power, with all that status had claimed, and nothing torn. What it was
// told is written is there also if it never flushed it. A file may have to be opened anew.
func TestSamba(t *testing.T) {
	needs(t, "smbd", "mount.cifs", "arping", "etcd")
	inGuests(t, pairMembers(t, smbModules...), pairTasks(), func(t *testing.T, g *guests) {
		p := newHAPair(g, "../docs/samba.md", "/dev/nvme1n1", ubd(0))
		defer p.explain("'blockferry*'", "srv-data.mount", "smbd", "data-address", "etcd")
		p.walk("The server")
		p.between("../docs/nfs.md", "Certificates", "The server")
		p.walk("Switch over")
		p.client.ask(p.client.name, "write", writing{Path: "/mnt/files/records", History: pairRecords, From: 1, Reopen: true}, nil)
		p.client.acked(20)
		p.moved("Pull the plug", "/srv/data/share/records")
		p.goesOn(p.client.written().Acked + 20)
		// What a server said is written is on its disk, and so in the next cut.
		sum := p.client.shell("head -c 4096 /dev/urandom >/run/unflushed && cp /run/unflushed /mnt/files/unflushed && sha256sum </run/unflushed")
		p.b.run("sync", "--wait", "data")
		p.cut("/srv/data/share/records")
		if held := p.a.shell("sha256sum </srv/data/share/unflushed"); held != sum {
			t.Errorf("what was written and not flushed is %s, was %s", held, sum)
		}
		p.walk("")
		p.client.shell("cmp /run/unflushed /mnt/files/unflushed")
	})
}

// between runs the blocks of another page, from one section to another, to which the page
// leads.
func (w *walker) between(page, from, until string) {
	w.t.Helper()
	blocks, err := readWalk(page)
	w.must(err)
	for len(blocks) > 0 && blocks[0].section != from {
		blocks = blocks[1:]
	}
	(&walker{w.guests, page, w.here, blocks}).walk(until)
}

// startReopening is startNumbered for a file that does not stay open when its server is lost.
func startReopening(t *testing.T, path string, h history) *writer {
	t.Helper()
	w := &writer{done: make(chan struct{}), first: 1}
	r := &reopened{t: t, path: path, ending: &w.stopping}
	if err := r.open(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(w.done)
		w.err = errors.Join(w.writeRecords(r, h), r.file.Close())
	}()
	t.Cleanup(func() {
		w.stopping.Store(true)
		select {
		case <-w.done:
		case <-time.After(10 * time.Second): // a mount whose server is gone waits
		}
	})
	return w
}

// reopened is a file which, when it can't be written or flushed any more, is opened anew; what was
// written since the last flush is written again.
type reopened struct {
	t      *testing.T
	path   string
	file   *os.File
	ending *atomic.Bool // then it is no longer tried
	data   []byte       // the write since the last flush, and its place
	at     int64
	err    error // of that write
}

func (r *reopened) open() (err error) {
	r.file, err = os.OpenFile(r.path, os.O_WRONLY|os.O_CREATE, 0o644)
	return err
}

// WriteAt keeps data until the next Sync, which says whether it was written.
func (r *reopened) WriteAt(data []byte, at int64) (int, error) {
	r.data, r.at = data, at
	_, r.err = r.file.WriteAt(data, at)
	return len(data), nil
}

func (r *reopened) Sync() error {
	err := r.err
	if err == nil {
		err = r.file.Sync()
	}
	for err != nil && !r.ending.Load() {
		r.t.Logf("%s is opened anew: %v", r.path, err)
		_ = r.file.Close() // it may say the same again
		if err = r.open(); err == nil {
			_, err = r.file.WriteAt(r.data, r.at)
		}
		if err == nil {
			err = r.file.Sync()
		}
		if err != nil {
			time.Sleep(100 * time.Millisecond)
		}
	}
	return err
}

// A file that fails is opened anew, and holds what was written since the last flush.
func TestReopened(t *testing.T) {
	r := &reopened{t: t, path: t.TempDir() + "/file", ending: &atomic.Bool{}}
	if err := r.open(); err != nil {
		t.Fatal(err)
	}
	for i, text := range []string{"one", "two", "six"} {
		if i == 1 { // the write fails
			r.file.Close()
		}
		_, _ = r.WriteAt([]byte(text), int64(3*i))
		if i == 2 { // the flush fails
			r.file.Close()
			if err := os.Truncate(r.path, 6); err != nil {
				t.Fatal(err)
			}
		}
		if err := r.Sync(); err != nil {
			t.Error(err)
		}
	}
	if text := mustRead(t, r.path); text != "onetwosix" {
		t.Errorf("it holds '%s'", text)
	}
	r.ending.Store(true)
	r.file.Close()
	if err := r.Sync(); err == nil {
		t.Error("a failure is passed over")
	}
}
