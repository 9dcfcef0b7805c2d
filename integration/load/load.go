package load

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
)

// The load: several writers on one file system, each making everything it
// writes durable and entering it in the ledger.
//
//	log/A/SEGMENT    records appended, 100 bytes to 256 KiB, fsync after each; old segments are deleted
//	pages/B          4 KiB pages overwritten in place at random, up to 16, then fdatasync
//	files/C/NAME     small files written, fsynced, renamed over the old one, folder fsynced
const (
	// Writers is how many work at once.
	Writers = logWriters + pageWriters + 1

	logWriters      = 2
	pageWriters     = 2
	pagesPerFile    = 16384
	fileNames       = 200
	segmentBytes    = 8 << 20
	segmentsKept    = 6
	maxRecordBytes  = 256 << 10
	pageBytes       = 4096
	maxPagesAtOnce  = 16
	blockHeadBytes  = 32
	blockMagic      = 0x62666d6f
	pauseBetweenOps = 10 * time.Millisecond
)

// A block is what every writer writes:
//
//	0 magic u32 | 4 crc32c of the rest u32 | 8 length u64 | 16 version u64 | 24 crc32c of the key u64 | 32 noise
func sealBlock(block []byte, key string, version int) {
	binary.LittleEndian.PutUint32(block[0:], blockMagic)
	binary.LittleEndian.PutUint64(block[8:], uint64(len(block)))
	binary.LittleEndian.PutUint64(block[16:], uint64(version))
	binary.LittleEndian.PutUint64(block[24:], uint64(checksum([]byte(key))))
	binary.LittleEndian.PutUint32(block[4:], checksum(block[8:]))
}

// openBlock returns the version of the block of a key at the front of b and
// its length.
func openBlock(b []byte, key string) (version, length int, err error) {
	if len(b) < blockHeadBytes || binary.LittleEndian.Uint32(b) != blockMagic {
		return 0, 0, fmt.Errorf("%s: %w", key, errNoBlock)
	}
	declared := binary.LittleEndian.Uint64(b[8:])
	if declared < blockHeadBytes || declared > uint64(len(b)) {
		return 0, 0, fmt.Errorf("%s: a block of %d bytes in %d", key, declared, len(b))
	}
	b = b[:declared]
	if binary.LittleEndian.Uint32(b[4:]) != checksum(b[8:]) {
		return 0, 0, fmt.Errorf("%s: torn: its checksum is wrong", key)
	}
	if binary.LittleEndian.Uint64(b[24:]) != uint64(checksum([]byte(key))) {
		return 0, 0, fmt.Errorf("%s: holds another place's block", key)
	}
	return int(binary.LittleEndian.Uint64(b[16:])), len(b), nil
}

var errNoBlock = errors.New("no block of ours here")

func checksum(b []byte) uint32 { return crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)) }

func noise(random *rand.Rand, b []byte) {
	for ; len(b) >= 8; b = b[8:] {
		binary.LittleEndian.PutUint64(b, random.Uint64())
	}
}

// Load is all writers at work on one folder, until the context ends or the
// file system fails.
type Load struct {
	Dir    string // empty
	Ledger *Ledger

	group  sync.WaitGroup
	mu     sync.Mutex
	failed error // the first failure
}

// Start starts the writers.
func (l *Load) Start(ctx context.Context) error {
	for _, dir := range []string{"log", "pages", "files"} {
		if err := os.Mkdir(filepath.Join(l.Dir, dir), 0o755); err != nil {
			return err
		}
	}
	writers := []func(context.Context, int) error{}
	for range logWriters {
		writers = append(writers, l.appendRecords)
	}
	for range pageWriters {
		writers = append(writers, l.overwritePages)
	}
	writers = append(writers, l.replaceFiles)
	for i, write := range writers {
		l.group.Go(func() {
			if err := write(ctx, i); err != nil && ctx.Err() == nil {
				l.mu.Lock()
				defer l.mu.Unlock()
				if l.failed == nil {
					l.failed = err
				}
			}
		})
	}
	return nil
}

// Wait returns the first writer's failure after all have ended.
func (l *Load) Wait() error {
	l.group.Wait()
	return l.failed
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

func segmentName(writer, segment int) string { return fmt.Sprintf("log/%d-%06d", writer, segment) }

// recordKey names one record: logs are never overwritten, so each has one version.
func recordKey(segment string, offset int64) string { return fmt.Sprintf("%s@%d", segment, offset) }

func (l *Load) appendRecords(ctx context.Context, writer int) error {
	random := rand.New(rand.NewPCG(uint64(writer), 1))
	buffer := make([]byte, maxRecordBytes)
	var keysOf [][]string // by segment
	for segment := 0; ; segment++ {
		name := segmentName(writer, segment)
		file, err := l.create(name)
		if err != nil {
			return err
		}
		keys := []string{}
		for offset := int64(0); offset < segmentBytes; {
			if err := pause(ctx, pauseBetweenOps); err != nil {
				return errors.Join(err, file.Close())
			}
			// Mostly small, some large.
			limit := 8 << 10
			if random.IntN(8) == 0 {
				limit = maxRecordBytes
			}
			record := buffer[:(100+random.IntN(limit-100))&^7]
			key := recordKey(name, offset)
			noise(random, record)
			sealBlock(record, key, 1)
			l.Ledger.issue(key)
			if _, err := file.Write(record); err != nil {
				return errors.Join(err, file.Close())
			}
			if err := file.Sync(); err != nil {
				return errors.Join(err, file.Close())
			}
			l.Ledger.commit(int64(len(record)), key)
			keys = append(keys, key)
			offset += int64(len(record))
		}
		if err := file.Close(); err != nil {
			return err
		}
		keysOf = append(keysOf, keys)
		if old := segment - segmentsKept; old >= 0 {
			for _, key := range keysOf[old] {
				l.Ledger.forget(key)
			}
			keysOf[old] = nil
			if err := os.Remove(filepath.Join(l.Dir, segmentName(writer, old))); err != nil {
				return err
			}
		}
	}
}

// create makes a file whose name is durable.
func (l *Load) create(name string) (*os.File, error) {
	path := filepath.Join(l.Dir, name)
	file, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	return file, syncDir(filepath.Dir(path))
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

func pageKey(file string, page int) string { return file + "#" + strconv.Itoa(page) }

func (l *Load) overwritePages(ctx context.Context, writer int) error {
	random := rand.New(rand.NewPCG(uint64(writer), 2))
	name := fmt.Sprintf("pages/%d", writer)
	file, err := l.create(name)
	if err != nil {
		return err
	}
	defer file.Close()
	if err := file.Truncate(pagesPerFile * pageBytes); err != nil {
		return err
	}
	block := make([]byte, pageBytes)
	for {
		if err := pause(ctx, pauseBetweenOps); err != nil {
			return err
		}
		chosen := map[string]int{}
		for range 1 + random.IntN(maxPagesAtOnce) {
			page := random.IntN(pagesPerFile)
			chosen[pageKey(name, page)] = page
		}
		keys := make([]string, 0, len(chosen))
		for key, page := range chosen {
			noise(random, block)
			sealBlock(block, key, l.Ledger.next(key))
			l.Ledger.issue(key)
			if _, err := file.WriteAt(block, int64(page)*pageBytes); err != nil {
				return err
			}
			keys = append(keys, key)
		}
		if err := file.Sync(); err != nil {
			return err
		}
		l.Ledger.commit(int64(len(keys))*pageBytes, keys...)
	}
}

func (l *Load) replaceFiles(ctx context.Context, writer int) error {
	random := rand.New(rand.NewPCG(uint64(writer), 3))
	for {
		if err := pause(ctx, pauseBetweenOps); err != nil {
			return err
		}
		key := "files/" + strconv.Itoa(random.IntN(fileNames))
		block := make([]byte, 100+random.IntN(16<<10))
		noise(random, block)
		sealBlock(block, key, l.Ledger.next(key))
		l.Ledger.issue(key)
		if err := l.replace(key, block); err != nil {
			return err
		}
		l.Ledger.commit(int64(len(block)), key)
	}
}

func (l *Load) replace(name string, content []byte) error {
	path := filepath.Join(l.Dir, name)
	file, err := os.Create(path + ".new")
	if err != nil {
		return err
	}
	if _, err := file.Write(content); err != nil {
		return errors.Join(err, file.Close())
	}
	if err := errors.Join(file.Sync(), file.Close()); err != nil {
		return err
	}
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// ReadBack finds which version of each key a mounted image holds. An error
// says that something is torn.
func ReadBack(dir string) (map[string]int, error) {
	found := map[string]int{}
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		switch kind, _, _ := strings.Cut(name, "/"); kind {
		case "log":
			readLog(found, name, content)
			return nil
		case "pages":
			return readPages(found, name, content)
		case "files":
			if strings.HasSuffix(name, ".new") {
				return nil // not renamed yet: nothing is promised
			}
			version, length, err := openBlock(content, name)
			if err == nil && length != len(content) {
				err = fmt.Errorf("%s: %d bytes, should be %d", name, len(content), length)
			}
			found[name] = version
			return err
		}
		return nil
	})
	return found, err
}

// readLog stops at the first record that is not whole: the end of a log may
// hold part of what was being written. If more should be there the ledger
// finds it missing.
func readLog(found map[string]int, name string, content []byte) {
	for offset := 0; offset < len(content); {
		key := recordKey(name, int64(offset))
		version, length, err := openBlock(content[offset:], key)
		if err != nil {
			return
		}
		found[key] = version
		offset += length
	}
}

// readPages: a page is written as one block, so it is never seen half.
func readPages(found map[string]int, name string, content []byte) error {
	for page := 0; (page+1)*pageBytes <= len(content); page++ {
		block := content[page*pageBytes : (page+1)*pageBytes]
		key := pageKey(name, page)
		version, _, err := openBlock(block, key)
		if errors.Is(err, errNoBlock) && isZero(block) {
			continue
		}
		if err != nil {
			return err
		}
		found[key] = version
	}
	return nil
}

func isZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}
