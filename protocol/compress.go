package protocol

import (
	"fmt"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
)

// Codec is how a frame's payload is compressed.
type Codec uint8

const (
	CodecNone Codec = 0
	CodecS2   Codec = 1
	CodecZstd Codec = 2
)

// String is the codec's name in configuration and messages.
func (c Codec) String() string {
	switch c {
	case CodecNone:
		return "none"
	case CodecS2:
		return "s2"
	case CodecZstd:
		return "zstd"
	}
	return fmt.Sprintf("codec %d", uint8(c))
}

// ParseCodec is the opposite of String.
func ParseCodec(name string) (Codec, error) {
	for _, c := range []Codec{CodecNone, CodecS2, CodecZstd} {
		if c.String() == name {
			return c, nil
		}
	}
	return 0, fmt.Errorf("unknown compression %q: want none, s2 or zstd", name)
}

// Compressor packs payloads. When what it is given hardly shrinks it lets some
// pass unpacked, then tries again. It is for one goroutine at a time.
type Compressor struct {
	codec   Codec
	zstd    *zstd.Encoder
	tried   int // bytes, since it last judged
	saved   int // of them
	letPass int // bytes still to pass unpacked
	given   int // bytes, since it was last set to 0
}

// Packing pays if it saves one part in packWorthwhile. It is judged after
// packJudgeBytes tried; what hardly shrank lets packSkipBytes pass.
const (
	packWorthwhile = 32
	packJudgeBytes = 4 << 20
	packSkipBytes  = 60 << 20
)

// NewCompressor makes one for a codec; zstd runs at its fastest level.
func NewCompressor(codec Codec) (*Compressor, error) {
	c := &Compressor{codec: codec}
	switch codec {
	case CodecNone, CodecS2:
	case CodecZstd:
		// No checksum of its own: the frame has one.
		e, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest),
			zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false), zstd.WithWindowSize(MaxDataFrameBytes))
		if err != nil {
			return nil, fmt.Errorf("zstd encoder: %w", err)
		}
		c.zstd = e
	default:
		return nil, fmt.Errorf("unknown codec %d", codec)
	}
	return c, nil
}

// use has it pack with another codec from now on, one that is not stronger than
// what it was made for.
func (c *Compressor) use(codec Codec) { c.codec = codec }

// appendTo appends data's packed form to dst and says with what; CodecNone
// means that it would not shrink, and that nothing of use was appended.
func (c *Compressor) appendTo(dst, data []byte) ([]byte, Codec) {
	at := len(dst)
	c.given += len(data)
	if c.letPass > 0 {
		c.letPass -= len(data)
		return dst, CodecNone
	}
	switch c.codec {
	case CodecS2:
		need := s2.MaxEncodedLen(len(data))
		if cap(dst)-at < need {
			grown := make([]byte, at, 2*cap(dst)+need)
			copy(grown, dst)
			dst = grown
		}
		packed := s2.Encode(dst[at:at+need], data)
		dst = dst[:at+len(packed)]
	case CodecZstd:
		dst = c.zstd.EncodeAll(data, dst)
	default:
		return dst, CodecNone
	}
	packed := len(dst) - at
	c.tried += len(data)
	c.saved += max(0, len(data)-packed)
	if c.tried >= packJudgeBytes {
		if c.saved < c.tried/packWorthwhile {
			c.letPass = packSkipBytes
		}
		c.tried, c.saved = 0, 0
	}
	if packed >= len(data) {
		return dst[:at], CodecNone
	}
	return dst, c.codec
}

// Decompressor unpacks payloads. It may be used by several goroutines at
// once and needs no closing.
type Decompressor struct {
	zstd *zstd.Decoder
}

// NewDecompressor makes one that knows every codec. workers is how many
// goroutines will use it at once.
func NewDecompressor(workers int) (*Decompressor, error) {
	// The cap limit makes an output larger than the buffer an error instead
	// of an allocation.
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(workers), zstd.WithDecodeAllCapLimit(true),
		zstd.WithDecoderMaxMemory(2*MaxDataFrameBytes), zstd.WithDecoderMaxWindow(2*MaxDataFrameBytes))
	if err != nil {
		return nil, fmt.Errorf("zstd decoder: %w", err)
	}
	return &Decompressor{zstd: d}, nil
}

// Decode writes a data frame's content to dst, whose length must be the
// frame's. It never allocates by what the payload claims.
func (d *Decompressor) Decode(dst []byte, f Frame) error {
	if f.Kind != FrameData || int64(len(dst)) != f.Length {
		return fmt.Errorf("%w: kind %d of %d bytes decoded into %d", ErrBadFrame, f.Kind, f.Length, len(dst))
	}
	dst = dst[:len(dst):len(dst)]
	var n int
	switch f.Codec {
	case CodecNone:
		n = len(f.Payload)
		copy(dst, f.Payload)
	case CodecS2:
		claimed, err := s2.DecodedLen(f.Payload)
		if err == nil && claimed == len(dst) {
			_, err = s2.Decode(dst, f.Payload)
		}
		if err != nil {
			return fmt.Errorf("%w for volume offset %d: s2: %s", ErrBadFrame, f.Offset, err)
		}
		n = claimed
	case CodecZstd:
		out, err := d.zstd.DecodeAll(f.Payload, dst[:0])
		if err != nil {
			return fmt.Errorf("%w for volume offset %d: zstd: %s", ErrBadFrame, f.Offset, err)
		}
		n = len(out)
	default:
		return fmt.Errorf("%w for volume offset %d: unknown codec %d", ErrBadFrame, f.Offset, f.Codec)
	}
	if n != len(dst) {
		return fmt.Errorf("%w for volume offset %d: unpacks to %d bytes, its header says %d", ErrBadFrame, f.Offset, n, len(dst))
	}
	return nil
}
