package blockdev

// Extent is a range of a device, in bytes.
type Extent struct {
	Offset int64
	Length int64
}

// End is the first byte after the extent.
func (e Extent) End() int64 { return e.Offset + e.Length }
