package protocol

const maxWatchedBytes = 1 << 20

// watchedPlace is a stretch of the volume that any mount rewrites.
type watchedPlace struct {
	offset, length int64
	digest         [32]byte
}
