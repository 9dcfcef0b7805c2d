package era

import (
	"cmp"
	"slices"
	"sync"

	"blockferry/blockdev"
)

const (
	// A stretch of array blocks is read at once when it is at most
	// stretchBlocks long and no more than gapBlocks lie between two of them.
	stretchBlocks = 64
	gapBlocks     = 8
	// readsAtOnce hides the disk's latency: the array blocks of a device in
	// use for long are scattered all over its metadata.
	readsAtOnce = 16
)

// array describes an array of `length` values.
type array struct {
	root      uint64
	length    int64
	valueSize int
	// visit gets the values of one array block: those from index first on.
	// Blocks come one at a time, in no particular order.
	visit func(block uint64, first int64, values []byte) error
}

func (a array) perBlock() int64 { return int64(metadataBlockSize-arrayHeaderSize) / int64(a.valueSize) }

// arrayBlock is one entry of an array's btree.
type arrayBlock struct {
	block uint64
	index int64
}

// each visits all of an array, exactly once.
func (m *reader) each(a array) error {
	blocks := (a.length + a.perBlock() - 1) / a.perBlock()
	var list []arrayBlock
	err := m.tree(a.root, blockNumberSize, func(leaf node) error {
		for i := range leaf.entries {
			next := int64(len(list))
			if key := leaf.key(i); key != uint64(next) || next >= blocks {
				return unknown(leaf.block, "array tree: block %d of the array where %d of %d should be", key, next, blocks)
			}
			if err := m.claim(leaf.child(i)); err != nil {
				return err
			}
			list = append(list, arrayBlock{leaf.child(i), next})
		}
		return nil
	})
	if err != nil {
		return err
	}
	if n := int64(len(list)); n != blocks {
		return unknown(a.root, "array tree: it ends after %d of %d blocks", n, blocks)
	}
	slices.SortFunc(list, func(x, y arrayBlock) int { return cmp.Compare(x.block, y.block) })
	return m.readArray(a, list)
}

// readArray reads and visits array blocks, listed in the order they stand in.
func (m *reader) readArray(a array, list []arrayBlock) error {
	var (
		mu     sync.Mutex // guards what follows, and a.visit
		failed error
		wg     sync.WaitGroup
	)
	next := func() (stretch []arrayBlock) {
		mu.Lock()
		defer mu.Unlock()
		if failed != nil || len(list) == 0 {
			return nil
		}
		n := stretchOf(list)
		stretch, list = list[:n], list[n:]
		return stretch
	}
	for range min(readsAtOnce, (len(list)+stretchBlocks-1)/stretchBlocks) {
		wg.Go(func() {
			var memory []byte
			for stretch := next(); stretch != nil; stretch = next() {
				err := m.readStretchOf(a, stretch, &memory, &mu)
				if err != nil {
					mu.Lock()
					failed = cmp.Or(failed, err)
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	return failed
}

// readStretchOf reads neighbouring array blocks at once and visits them,
// holding mu.
func (m *reader) readStretchOf(a array, stretch []arrayBlock, memory *[]byte, mu *sync.Mutex) error {
	first, last := stretch[0].block, stretch[len(stretch)-1].block
	size := int(last-first+1) * metadataBlockSize
	if size > len(*memory) {
		*memory = blockdev.AlignedBuffer(size)
	}
	if err := m.readStretch((*memory)[:size], first); err != nil {
		return err
	}
	for _, e := range stretch {
		values, err := a.check((*memory)[(e.block-first)*metadataBlockSize:][:metadataBlockSize], e)
		if err != nil {
			return err
		}
		mu.Lock()
		err = a.visit(e.block, e.index*a.perBlock(), values)
		mu.Unlock()
		if err != nil {
			return err
		}
	}
	return nil
}

// stretchOf is how many of the first blocks, in ascending order, are read at
// once.
func stretchOf(list []arrayBlock) int {
	n := 1
	for n < len(list) && list[n].block-list[n-1].block <= gapBlocks+1 && list[n].block-list[0].block < stretchBlocks {
		n++
	}
	return n
}

// check checks an array block and returns its values.
func (a array) check(b []byte, e arrayBlock) ([]byte, error) {
	fail := func(format string, args ...any) ([]byte, error) {
		return nil, unknown(e.block, "array block: "+format, args...)
	}
	if got, want := le32(b, 0), checksum(b, arrayXOR); got != want {
		return fail("checksum %#x, want %#x", got, want)
	}
	if at := le64(b, 16); at != e.block {
		return fail("it says it is block %d", at)
	}
	if size := le32(b, 12); size != uint32(a.valueSize) {
		return fail("values of %d bytes, want %d", size, a.valueSize)
	}
	if limit := int64(le32(b, 4)); limit != a.perBlock() {
		return fail("at most %d values, want %d", limit, a.perBlock())
	}
	first := e.index * a.perBlock()
	want := min(a.perBlock(), a.length-first)
	if n := int64(le32(b, 8)); n != want {
		return fail("%d values, want %d: those from %d of %d", n, want, first, a.length)
	}
	return b[arrayHeaderSize:][:want*int64(a.valueSize)], nil
}
