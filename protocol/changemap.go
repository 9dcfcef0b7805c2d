package protocol

const (
	mapPageBytes   = 4096
	mapHeaderBytes = 32
	mapPageEntries = (mapPageBytes - mapHeaderBytes) / 8
	// ChunkBytes is the grain of the change map.
	ChunkBytes = 256 << 10
)

func mapPages(sizeBytes int64) int64 {
	chunks := (sizeBytes + ChunkBytes - 1) / ChunkBytes
	return (chunks + mapPageEntries - 1) / mapPageEntries
}

func writeWholeMap(store Store, l layout, tag uint64, epoch uint64) error { return nil }
