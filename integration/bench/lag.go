package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// The load whose lag is measured: writers, each with a file of a fixed size, overwrite its
// pages at random: writes of one page, or nine of ten of these and the others of up to 32.
// Each page begins with the number of the write:
//
//	0 magic u64 | 8 number u64 | 16 noise
//
// A writer makes some writes at a time durable together, so that it is not held up by
// waiting for the disk's flushes, and closes its file then: lsyncd looks at a file only
// when it is closed.
const (
	lagFiles       = 4 // and writers
	lagPage        = 4096
	lagWriteMost   = 32 // pages
	lagBatch       = 64 // writes
	lagMagic       = 0x6c61672d70616765
	lagHead        = 16
	lagSampleEvery = 100 * time.Millisecond
)

// record is a write that is durable at its source.
type record struct {
	number      uint64
	file        int
	first, last int // pages
	durable     time.Time
	before      int64 // bytes of all earlier ones
}

func (r record) bytes() int64 { return int64(r.last-r.first+1) * lagPage }

// numbered is the writers and what they remember.
type numbered struct {
	dir   string
	pages int  // of each file
	mixed bool // not all writes are of one page

	last atomic.Uint64 // number given

	mu      sync.Mutex
	records []record // in the order in which they were durable
	bytes   int64
}

func lagFile(dir string, i int) string { return filepath.Join(dir, fmt.Sprintf("pages-%d", i)) }

// prepare writes every page once.
func (n *numbered) prepare() error {
	noise := rand.NewChaCha8([32]byte{7})
	chunk := make([]byte, 256*lagPage)
	for i := range lagFiles {
		file, err := os.Create(lagFile(n.dir, i))
		if err != nil {
			return err
		}
		for page := 0; page < n.pages && err == nil; page += len(chunk) / lagPage {
			noise.Read(chunk)
			for p := 0; p < len(chunk); p += lagPage {
				sealPage(chunk[p:], 0)
			}
			_, err = file.Write(chunk)
		}
		if err := errors.Join(err, file.Sync(), file.Close()); err != nil {
			return err
		}
	}
	return nil
}

func sealPage(page []byte, number uint64) {
	binary.LittleEndian.PutUint64(page, lagMagic)
	binary.LittleEndian.PutUint64(page[8:], number)
}

// write writes until the time is over, at so many bytes a second (0: as fast
// as it goes).
func (n *numbered) write(ctx context.Context, lasting time.Duration, rate float64) error {
	n.mu.Lock()
	n.records = slices.Grow(n.records, int(rate*lasting.Seconds())/lagPage) // not copied while they write
	n.mu.Unlock()
	began, failed := time.Now(), make(chan error, lagFiles)
	for file := range lagFiles {
		go func() { failed <- n.writeFile(ctx, file, began, lasting, rate/lagFiles) }()
	}
	var err error
	for range lagFiles {
		err = errors.Join(err, <-failed)
	}
	return err
}

func (n *numbered) writeFile(ctx context.Context, file int, began time.Time, lasting time.Duration, rate float64) error {
	random := rand.New(rand.NewPCG(uint64(began.UnixNano()), uint64(file)))
	noise, buffer := make([]byte, 1<<20), make([]byte, lagWriteMost*lagPage)
	rand.NewChaCha8([32]byte{8, byte(file)}).Read(noise)
	wrote := int64(0)
	for wrote == 0 || time.Since(began) < lasting {
		batch := make([]record, 0, lagBatch)
		err := func() (err error) {
			out, err := os.OpenFile(lagFile(n.dir, file), os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, out.Close()) }()
			for range lagBatch {
				pages := 1
				if n.mixed && random.IntN(10) == 0 {
					pages = 2 + random.IntN(lagWriteMost-1)
				}
				r := record{number: n.last.Add(1), file: file}
				r.first = random.IntN(n.pages - pages + 1)
				r.last = r.first + pages - 1
				copy(buffer[:pages*lagPage], noise[random.IntN(len(noise)-len(buffer)):])
				for p := range pages {
					sealPage(buffer[p*lagPage:], r.number)
				}
				if _, err := out.WriteAt(buffer[:pages*lagPage], int64(r.first)*lagPage); err != nil {
					return err
				}
				batch = append(batch, r)
				wrote += r.bytes()
			}
			return unix.Fdatasync(int(out.Fd()))
		}()
		if err != nil {
			return err
		}
		n.mu.Lock()
		now := time.Now()
		for _, r := range batch {
			r.durable, r.before = now, n.bytes
			n.records = append(n.records, r)
			n.bytes += r.bytes()
		}
		n.mu.Unlock()
		due := 0.0
		if rate > 0 {
			due = float64(wrote) / rate
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Until(began.Add(time.Duration(due * float64(time.Second))))):
		}
	}
	return nil
}

// target is where the writes should arrive, read by their numbers.
type target struct {
	dir     string
	arrived int // records known to be there, from the first on
}

// holds says whether a record, or a later one in its place, is there.
func holds(file *os.File, r record) (bool, error) {
	var head [lagHead]byte
	for _, page := range []int{r.first, r.last} {
		if _, err := file.ReadAt(head[:], int64(page)*lagPage); err != nil {
			return false, err
		}
		if binary.LittleEndian.Uint64(head[:]) != lagMagic {
			return false, fmt.Errorf("%s, page %d: none of ours", file.Name(), page)
		}
		if binary.LittleEndian.Uint64(head[8:]) < r.number {
			return false, nil
		}
	}
	return true, nil
}

// lag is the age of the oldest record that is not there, with the bytes that were
// written from it on; and 0 if there is none.
func (t *target) lag(n *numbered) (lag time.Duration, behind int64, err error) {
	var files [lagFiles]*os.File
	for i := range files {
		// Opened anew: it may be another file by now, of the same name.
		file, err := os.Open(lagFile(t.dir, i))
		if err != nil {
			return 0, 0, err
		}
		defer file.Close()
		files[i] = file
	}
	n.mu.Lock()
	pending, bytes := n.records[t.arrived:], n.bytes
	n.mu.Unlock()
	for _, r := range pending {
		there, err := holds(files[r.file], r)
		if err != nil {
			return 0, 0, err
		}
		if !there {
			return time.Since(r.durable), bytes - r.before, nil
		}
		t.arrived++
	}
	return 0, 0, nil
}

// sampled is a lag over time.
type sampled struct {
	at     []time.Time
	lag    []float64 // seconds
	behind []float64 // bytes
}

func (s *sampled) add(at time.Time, lag time.Duration, behind int64) {
	s.at, s.lag, s.behind = append(s.at, at), append(s.lag, lag.Seconds()), append(s.behind, float64(behind))
}

// sample takes the lag over and over until the context ends.
func (t *target) sample(ctx context.Context, n *numbered) (s sampled, err error) {
	ticker := time.NewTicker(lagSampleEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return s, nil
		case <-ticker.C:
		}
		lag, behind, err := t.lag(n)
		if err != nil {
			return s, err
		}
		s.add(time.Now(), lag, behind)
	}
}

// committedCut is a cut that a replica had whole at a time.
type committedCut struct{ cut, committed time.Time }

// lagByCuts is the same for a replica that has cuts whole or not at all. The
// commits are in their order.
func lagByCuts(records []record, commits []committedCut, from, to time.Time) (s sampled) {
	arrived, next, written := 0, 0, 0
	for at := from; at.Before(to); at = at.Add(lagSampleEvery) {
		for next < len(commits) && !commits[next].committed.After(at) {
			for arrived < len(records) && !records[arrived].durable.After(commits[next].cut) {
				arrived++
			}
			next++
		}
		for written < len(records) && records[written].durable.Before(at) {
			written++
		}
		if arrived < written {
			oldest, newest := records[arrived], records[written-1]
			s.add(at, at.Sub(oldest.durable), newest.before+newest.bytes()-oldest.before)
		} else {
			s.add(at, 0, 0)
		}
	}
	return s
}

// growing says whether a replica falls behind more and more while writes go on from
// one time to another: at the end its last cut was much older than half-way.
func growing(commits []committedCut, from, to time.Time) bool {
	age := func(at time.Time) time.Duration {
		last := from
		for _, c := range commits {
			if !c.committed.After(at) {
				last = c.cut
			}
		}
		return at.Sub(last)
	}
	half := age(from.Add(to.Sub(from) / 2))
	return age(to) > 2*time.Second && age(to) > half*3/2
}

// windows is the 99th percentile of each of count equal stretches of time.
func (s sampled) windows(count int) (p99 []float64) {
	for i := range count {
		part := s.lag[i*len(s.lag)/count : (i+1)*len(s.lag)/count]
		p99 = append(p99, percentile(part, 99))
	}
	return p99
}

// apart tells the windows in which an epoch was void from those in which none was.
func (s sampled) apart(count int, void []voidEpoch) (whole, voided []float64) {
	for i, p99 := range s.windows(count) {
		part := s.at[i*len(s.at)/count : (i+1)*len(s.at)/count]
		hit := slices.ContainsFunc(void, func(v voidEpoch) bool {
			return (i == 0 || !v.At.Before(part[0])) && (i == count-1 || v.At.Before(part[len(part)-1].Add(lagSampleEvery)))
		})
		if hit {
			voided = append(voided, p99)
		} else {
			whole = append(whole, p99)
		}
	}
	return whole, voided
}

// perSecond is the largest of each second, for a picture.
func (s sampled) perSecond() (lags []float64) {
	for i, lag := range s.lag {
		second := int(s.at[i].Sub(s.at[0]).Seconds())
		for len(lags) <= second {
			lags = append(lags, 0)
		}
		lags[second] = max(lags[second], float64(int(lag*100))/100)
	}
	return lags
}
