package volume

import "testing"

func TestWatchedPlacesAreInTheVolume(t *testing.T) {
	for _, size := range []int64{4096, 64 << 10, 1 << 20, 1<<20 + 4096, 37<<20 + 3*4096, 1 << 40} {
		w := Watch{}
		for _, at := range watchOffsets(size) {
			w.Places = append(w.Places, WatchedPlace{Offset: at})
		}
		if len(w.Places) == 0 || len(w.Places) > maxWatched || w.check(size) != nil {
			t.Errorf("%d bytes: %v, %v", size, w.Places, w.check(size))
		}
		if last := w.Places[len(w.Places)-1].extent(size); last.Offset+last.Length != size {
			t.Errorf("%d bytes: the last place ends at %d", size, last.Offset+last.Length)
		}
	}
}
