package era

import (
	"io"
	"math/rand/v2"
	"sync"
	"testing"
	"time"
)

// tebibyte is the metadata of a 1 TiB device with blocks of 64 KiB, one in
// fifty written, and one writeset not digested yet.
var tebibyte = sync.OnceValue(func() [2]*image {
	const blocks = 1 << 24
	var images [2]*image
	for i, order := range []*rand.Rand{nil, rand.New(rand.NewPCG(1, 1))} {
		images[i] = newImage(18000, order)
		images[i].write(content{blocks: blocks, era: 100, sectors: 128,
			digest: func(b uint32) uint32 { return b * 2654435761 >> 25 % 100 },
			sets:   []set{{100, blocks, scattered(3, 100)}}}, 0)
	}
	return images
})

// slow is a disk: each read takes a while, and several go on at once.
type slow struct {
	r     io.ReaderAt
	delay time.Duration
}

func (s slow) ReadAt(p []byte, off int64) (int, error) {
	time.Sleep(s.delay)
	return s.r.ReadAt(p, off)
}

func BenchmarkChanged(b *testing.B) {
	for i, name := range []string{"in order", "scattered"} {
		r := tebibyte()[i].reader()
		for _, delay := range []time.Duration{0, 100 * time.Microsecond} {
			b.Run(name+", reads of "+delay.String(), func(b *testing.B) {
				for b.Loop() {
					if _, err := ChangedInactive(slow{r, delay}, 98); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
