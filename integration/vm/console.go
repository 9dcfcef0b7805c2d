package vm

import (
	"bytes"
	"io"
	"regexp"
	"strconv"
	"strings"
	"sync"
)

// outputLimitBytes bounds what is kept of one guest's console.
const outputLimitBytes = 8 << 20

// console keeps what a guest prints, without the carriage returns of its tty.
type console struct {
	mu      sync.Mutex
	text    bytes.Buffer
	dropped int
	live    io.Writer
	noise   *regexp.Regexp
}

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	clean := bytes.ReplaceAll(p, []byte("\r"), nil)
	if room := outputLimitBytes - c.text.Len(); len(clean) <= room {
		c.text.Write(clean)
	} else {
		c.dropped += len(clean)
	}
	if c.live != nil {
		c.live.Write(p) // with what a progress bar needs
	}
	return len(p), nil
}

func (c *console) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	text := strings.ToValidUTF8(c.text.String(), "?")
	if c.noise != nil {
		text = c.noise.ReplaceAllString(text, "")
	}
	if c.dropped > 0 {
		text += "\n[" + strconv.Itoa(c.dropped) + " more bytes of console output dropped]\n"
	}
	return text
}
